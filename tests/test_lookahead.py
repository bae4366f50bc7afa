"""Tests lookahead: what is drafted, which queries vote, and that the draft leaves no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import tiny_model

from minikv_jax import layerwise
from minikv_jax.cache.capacity import capacities
from minikv_jax.generate import compile_ahead, generate, stream
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.kvzip import KVzip
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.models.config import RopeScaling
from minikv_jax.models.decoder import Llama
from minikv_jax.prefill import prefill, prefill_layer, score

DRAFTED = 6
VOTES = SnapKV(observation_window=DRAFTED, pooling_kernel=1)
METHOD = Method(scorer=VOTES, heavy=20, recent=4, sinks=2, lookahead=DRAFTED)
PACKED = dataclasses.replace(
    METHOD, quantizer=MinMax(k_bits=4, v_bits=4, group_size=16), tail=Tail(length=32), refit=Ridge(queries=4, turned=3)
)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(5, 60, length).tolist() for length in (90, 41)]


def padded(prompts: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    width = max(map(len, prompts))
    return jnp.array([[*row, *[0] * (width - len(row))] for row in prompts]), jnp.array([len(row) for row in prompts])


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def compiled(graphdef, params, ids: jax.Array, lengths: jax.Array, method: Method, room: int):
    return prefill(nnx.merge(graphdef, params), ids, lengths, method, room)


def prefilled(model: Llama, method: Method, room: int = 0):
    """Runs `prefill` as a compiled program."""
    return compiled(*nnx.split(model), *padded(PROMPTS), method, room)


def without_eos() -> Llama:
    return tiny_model(num_hidden_layers=1, max_position_embeddings=256, eos_token_ids=())


def test_the_drafts_queries_choose():
    """The kept tokens are those that the votes of a greedy draft by the compressed cache would choose."""
    model = without_eos()
    plain = dataclasses.replace(METHOD, lookahead=0)
    draft = generate(model, PROMPTS, method=plain, max_new_tokens=DRAFTED).tokens.tolist()
    both = padded([[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, draft, strict=True)])
    _, layers = layerwise.prefill_layers(model, *both, False, None)
    _, cache = prefilled(model, METHOD)
    _, other = prefilled(model, plain)
    differ = False
    for layer, made, undrafted in zip(layers, cache.layers, other.layers, strict=True):
        scores = np.asarray(score(LayerInputs(layer.q, layer.k, layer.v, both[1]), METHOD))
        for row, prompt in enumerate(PROMPTS):
            middle = np.arange(METHOD.sinks, len(prompt) - 4)
            for head in range(made.tail.k.shape[1]):
                best = middle[np.argsort(-scores[row, head, middle], kind="stable")[:20]]
                at = np.sort([0, 1, *best, *range(len(prompt) - 4, len(prompt))])
                got = made.tail.k[row, head, : len(at)]
                np.testing.assert_allclose(got, layer.k[row, at, head], rtol=1e-5, atol=1e-5)
                differ |= not np.allclose(got, undrafted.tail.k[row, head, : len(at)])
        assert made.tail.length.tolist() == [26, 26]
    assert differ  # from the choice without a draft


def test_rows_are_alone():
    """A row's draft and cache do not depend on the others; neither do the steps of `stream`."""
    model = without_eos()
    together = generate(model, PROMPTS, method=PACKED, max_new_tokens=5)
    alone = generate(model, [PROMPTS[1]], method=PACKED, max_new_tokens=5)
    assert alone.tokens[0].tolist() == together.tokens[1].tolist()
    *_, last = stream(model, PROMPTS, method=PACKED, max_new_tokens=5)
    assert last.tokens.tolist() == together.tokens.tolist()
    assert together.cache.length.tolist() == [95, 46]


def test_a_draft_ends_at_the_end_of_sequence():
    """Votes of a row whose draft ends early are those of its last queries, the prompt's own among them."""
    free = without_eos()
    draft = generate(free, PROMPTS, method=dataclasses.replace(METHOD, lookahead=0), max_new_tokens=DRAFTED).tokens
    stop = int(draft[0, 1])
    first = draft[1].tolist().index(stop) + 1 if stop in draft[1].tolist() else DRAFTED
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=256, eos_token_ids=(stop,))
    ends = 1 if int(draft[0, 0]) == stop else 2
    both = padded([PROMPTS[0] + draft[0, :ends].tolist(), PROMPTS[1] + draft[1, :first].tolist()])
    _, layers = layerwise.prefill_layers(model, *both, False, None)
    _, cache = prefilled(model, METHOD)
    layer, made = layers[0], cache.layers[0]
    scores = np.asarray(score(LayerInputs(layer.q, layer.k, layer.v, both[1]), METHOD))
    for row, prompt in enumerate(PROMPTS):
        middle = np.arange(2, len(prompt) - 4)
        at = middle[np.argsort(-scores[row, 0, middle], kind="stable")[:20]]
        at = np.sort([0, 1, *at, *range(len(prompt) - 4, len(prompt))])
        np.testing.assert_allclose(made.tail.k[row, 0, :26], layer.k[row, at, 0], rtol=1e-5, atol=1e-5)


def test_layer_by_layer_is_the_same():
    model = tiny_model(num_hidden_layers=2, max_position_embeddings=256, eos_token_ids=())
    method, (ids, lengths) = PACKED, padded(PROMPTS)
    hidden, cache = prefilled(model, method, 4)
    last, layers = layerwise.prefill_layers(model, ids, lengths, False, None)
    inputs, seen = layerwise.look_ahead(model, method, (ids, lengths), last, layers, None)
    sizes = capacities(model.config, method, ids.shape[1], 4)
    made = layerwise.compress_layers(model.config, method, inputs, lengths, seen, sizes, None).cache
    np.testing.assert_allclose(last, hidden, rtol=1e-5, atol=1e-5)
    assert [x.shape for x in jax.tree.leaves(made)] == [x.shape for x in jax.tree.leaves(cache)]
    for one, other in zip(jax.tree.leaves(made.parts[0].tail), jax.tree.leaves(cache.parts[0].tail), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_repetition_chooses():
    """KVzip's tokens are those with the largest weights from the prompt's second run, by prefill and layer by layer."""
    model = without_eos()
    method = dataclasses.replace(METHOD, scorer=KVzip(), lookahead=0)
    both = padded([[*prompt, *prompt] for prompt in PROMPTS])
    _, twice = layerwise.prefill_layers(model, *both, False, None)
    scores = np.asarray(KVzip().score(LayerInputs(twice[0].q, twice[0].k, twice[0].v, both[1])))
    _, cache = prefilled(model, method)
    ids, lengths = padded(PROMPTS)
    last, layers = layerwise.prefill_layers(model, ids, lengths, False, None)
    inputs, seen = layerwise.look_ahead(model, method, (ids, lengths), last, layers, None)
    assert seen.tolist() == [180, 82]
    sizes = capacities(model.config, method, ids.shape[1], 0)
    other = layerwise.compress_layers(model.config, method, inputs, lengths, seen, sizes, None).cache
    for row, prompt in enumerate(PROMPTS):
        middle = np.arange(2, len(prompt) - 4)
        for head in range(2):
            at = middle[np.argsort(-scores[row, head, middle], kind="stable")[:20]]
            at = np.sort([0, 1, *at, *range(len(prompt) - 4, len(prompt))])
            for made in (cache, other):
                got = made.parts[0].tail.k[row, head, :26]
                np.testing.assert_allclose(got, twice[0].k[row, at, head], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_repeated_is_refused():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=96)
    method = dataclasses.replace(METHOD, scorer=KVzip(), lookahead=0)
    with pytest.raises(ValueError, match="lookahead=6 with KVzip: it repeats the prompt"):
        dataclasses.replace(METHOD, scorer=KVzip())
    assert method.runs_twice
    assert not dataclasses.replace(method, heavy=0, recent=8).runs_twice  # scores choose nothing
    with pytest.raises(ValueError, match="49 prompt tokens: the model's 96 positions leave room for 48"):
        generate(model, [[5] * 49], method=method, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"row 0 has 49 tokens: .* leave room for 48"):
        prefill(model, jnp.full((1, 60), 5), jnp.array([49]), method, 1)
    arrays = jnp.ones((1, 8, 2, 16))
    with pytest.raises(NotImplementedError, match="scorer=KVzip: only this library's own models run a prompt twice"):
        prefill_layer(LayerInputs(arrays, arrays, arrays, jnp.array([8])), method, 1)


def test_what_cannot_be_drafted_is_refused():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=96)
    with pytest.raises(ValueError, match="lookahead=3 where scores choose no token"):
        Method(scorer=VOTES, heavy=8, recent=1.0, lookahead=3)
    with pytest.raises(ValueError, match="lookahead=1025: expected"):
        dataclasses.replace(METHOD, lookahead=1025)
    with pytest.raises(ValueError, match="92 prompt tokens: the model's 96 positions leave room for 90"):
        generate(model, [[5] * 92], method=METHOD, max_new_tokens=1)
    with pytest.raises(ValueError, match="92 prompt tokens: the model's 96 positions leave room for 90"):
        compile_ahead(model, 1, 92, method=METHOD, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"row 0 has 92 tokens: .* 96 positions leave room for 90"):
        prefill(model, jnp.full((1, 92), 5), jnp.array([92]), METHOD, 1)
    dynamic = RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=64)
    with pytest.raises(ValueError, match="lookahead=6: the model's rotary frequencies depend on the length"):
        generate(tiny_model(rope_scaling=dynamic), [[5] * 9], method=METHOD, max_new_tokens=1)
    hidden, layers = jnp.zeros((1, 48)), []
    with pytest.raises(ValueError, match="92 prompt tokens: the model's 96 positions leave room for 90"):
        layerwise.look_ahead(model, METHOD, (jnp.full((1, 92), 5), jnp.array([92])), hidden, layers, None)
    arrays = jnp.ones((1, 8, 2, 16))
    with pytest.raises(NotImplementedError, match="lookahead=6: only this library's own models draft"):
        prefill_layer(LayerInputs(arrays, arrays, arrays, jnp.array([8])), METHOD, 1)
