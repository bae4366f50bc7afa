"""Tests eviction during generation against a plain version with one row and KV head at a time."""

import dataclasses
import functools
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive
from support.layers import assert_close, cache_of, normal
from support.projections import VOCABULARY, Projections, projections
from support.tiny import tiny_config, tiny_model

from minikv_jax.cache import memory
from minikv_jax.cache.budgets import budgets_from_scores
from minikv_jax.cache.checkpoint import restore_cache, save_cache
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import Eviction, LayerCache
from minikv_jax.decode import decode, extend
from minikv_jax.generate import generate
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Amount, Method, Share, Tokens
from minikv_jax.methods.minikv import Variance
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.tova import TOVA
from minikv_jax.models.decoder import Llama
from minikv_jax.ops.decode_attention import decode_attention_weights
from minikv_jax.ops.evict import evict
from minikv_jax.prefill import prefill, prefill_layer

LENGTHS, BUCKET, STEPS = [50, 31, 12, 3], 64, 30
METHODS = {
    "h2o": dataclasses.replace(lookup.get("h2o"), evict_every=1),
    "h2o-counts": Method(scorer=H2O(), heavy=9, recent=5, sinks=2, evict_every=7),
    "h2o-pyramid": Method(scorer=H2O(), heavy=0.2, recent=0.1, budget=Pyramid(), evict_every=4),
    "tova": dataclasses.replace(lookup.get("tova"), evict_every=1),
    "streaming-llm": Method(sinks=3, recent=10, evict_every=6),
    "never-full": Method(scorer=H2O(), heavy=20, recent=20, evict_every=500),
}


class Head:
    """Cache of one row and KV head: tokens by position in the text, each with a score."""

    def __init__(self, scores: np.ndarray, length: int, sinks: int, heavy: Amount, recent: Amount):
        self.sinks = sinks
        self.heavy, self.recent = (
            amount.count if isinstance(amount, Tokens) else naive.tokens_of(amount, length)
            for amount in (heavy, recent)
        )
        kept = naive.kept_positions(scores, length, sinks=sinks, heavy=self.heavy, recent=self.recent)
        self.scores = {place: float(scores[place]) for place in kept}

    @property
    def budget(self) -> int:
        return self.sinks + self.heavy + self.recent

    def cut_back(self) -> None:
        places = list(self.scores)
        middle = places[self.sinks : len(places) - self.recent]
        leave = sorted(middle, key=lambda place: -self.scores[place])[self.heavy :]
        self.scores = {place: score for place, score in self.scores.items() if place not in leave}


class Text:
    """All rows' tokens and caches; evicts as in the papers."""

    def __init__(self, model: Projections, method: Method, ids: np.ndarray):
        self.model, self.method = model, method
        self.ids = [list(row[:n]) for row, n in zip(ids, LENGTHS, strict=True)]
        layers = model.config.num_hidden_layers
        shares = naive.layer_shares(method, layers)
        self.heads: list[list[list[Head]]] = []
        for layer in range(layers):
            heavy = Tokens(shares[layer]) if isinstance(method.heavy, Tokens) else Share(shares[layer] / 10000)
            scores = self.prompt_scores(*(table[layer][ids] for table in (model.q, model.k)))
            kinds = method.sinks, heavy, method.recent
            self.heads.append([[Head(head, n, *kinds) for head in row] for row, n in zip(scores, LENGTHS, strict=True)])

    def prompt_scores(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        if not isinstance(self.method.scorer, TOVA):
            return naive.prefill_attention(q, k, k, LENGTHS)[1]
        last = naive.window_scores(q, k, LENGTHS, observation_window=1, pooling="max", pooling_kernel=1)
        return np.broadcast_to(last.sum(axis=1, keepdims=True) / q.shape[2], last.shape)

    def step(self, row: int, token: int) -> np.ndarray:
        """Appends a token; returns the attention outputs [L, N, H] of its queries."""
        model, place = self.model, len(self.ids[row])
        self.ids[row].append(token)
        kv_heads, group = model.k.shape[2], model.q.shape[2] // model.k.shape[2]
        out = np.zeros(model.q[:, 0].shape)
        for layer, rows in enumerate(self.heads):
            given = []
            for number, head in enumerate(rows[row]):
                head.scores[place] = 0.0
                keys, values = self.stored(layer, row, number)
                weights = np.zeros(len(keys))
                for n in range(number * group, (number + 1) * group):
                    q = model.q[layer, token, n].astype(np.float64)
                    of_query = naive.softmax(keys.astype(np.float64) @ q * len(q) ** -0.5)
                    out[layer, n] = of_query @ values
                    weights += of_query
                given.append(weights)
            if isinstance(self.method.scorer, TOVA):
                given = [np.mean(given, axis=0)] * kv_heads
            for head, weights in zip(rows[row], given, strict=True):
                for at, weight in zip(head.scores, weights, strict=True):
                    head.scores[at] = weight + (0 if isinstance(self.method.scorer, TOVA) else head.scores[at])
                if len(head.scores) == head.budget + cast(int, self.method.evict_every):
                    head.cut_back()
        return out

    def stored(self, layer: int, row: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        ids = [self.ids[row][place] for place in self.heads[layer][row][head].scores]
        return self.model.k[layer, ids, head], self.model.v[layer, ids, head]


def assert_same(cache: KVCache, text: Text) -> None:
    """Checks for exactly the tokens that the reference has kept, with its scores."""
    for number, layer in enumerate(jax.tree.map(np.asarray, cache.layers)):
        assert layer.eviction is not None
        tail, scores = layer.tail, layer.eviction.scores
        for row, heads in enumerate(text.heads[number]):
            for at, head in enumerate(heads):
                count = int(tail.length[row])
                assert count == len(head.scores)
                keys, values = text.stored(number, row, at)
                np.testing.assert_array_equal(tail.k[row, at, :count], keys)
                np.testing.assert_array_equal(tail.v[row, at, :count], values)
                if scores is not None:
                    assert_close(scores[row, at, :count], np.array(list(head.scores.values())))
                    assert (scores[row, at, count:] == 0).all()


def inputs(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draws a prompt's ids, without repeats, and those of the next tokens."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(VOCABULARY)[: BUCKET + STEPS] for _ in LENGTHS])
    return ids[:, :BUCKET], ids[:, BUCKET:]


@pytest.mark.parametrize("name", METHODS)
def test_decode_evicts_like_naive(name: str):
    """Rows are ragged, one pauses, and one is shorter than its budget; bytes are as predicted."""
    method = METHODS[name]
    model = projections(2, (6, 2))
    llama = cast(Llama, model)
    ids, new_ids = inputs()
    run_prefill = jax.jit(lambda ids, lengths: prefill(llama, ids, lengths, method, STEPS)[1])
    cache = run_prefill(ids, np.array(LENGTHS))
    text = Text(model, method, ids)
    assert_same(cache, text)
    report = memory.report(
        model.config, method, prompt_length=BUCKET, max_new_tokens=STEPS, batch=len(LENGTHS), dtype="float32"
    )
    assert cache.nbytes == report.bytes
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(*args: Any) -> tuple[jax.Array, KVCache]:
        traces.append(args)
        return decode(llama, *args)

    shrank = 0
    for t in range(STEPS):
        active = np.array([1, 1, t % 5 != 2, t < 20], np.int32)
        before = cache.kept_tokens
        hidden, cache = step(cache, new_ids[:, t], active)
        hidden = np.asarray(hidden)
        for row in np.flatnonzero(active).tolist():
            assert_close(hidden[row], text.step(row, int(new_ids[row, t])), 2e-5)
        assert_same(cache, text)
        shrank += int((cache.kept_tokens <= before)[:, active > 0].sum())
    assert (shrank > 0) == (name != "never-full")
    assert len(traces) == 1


def test_more_tokens_at_once_are_one_decode_step_each():
    method, model = METHODS["h2o-counts"], projections(2, (4, 2))
    llama = cast(Llama, model)
    ids, new_ids = inputs(2)
    run_prefill = jax.jit(lambda: prefill(llama, jnp.asarray(ids), jnp.asarray(LENGTHS), method, 4)[1])
    counts = np.array([STEPS, 11, 0, 1], np.int32)
    text = Text(model, method, ids)
    outs = [[text.step(row, int(new_ids[row, t])) for t in range(count)] for row, count in enumerate(counts)]
    cache = run_prefill()
    assert cache.room() < STEPS
    hidden, cache = jax.jit(lambda *args: extend(llama, *args))(cache.grow(STEPS), new_ids, counts)
    assert_same(cache, text)
    for row, count in enumerate(counts):
        if count:
            assert_close(hidden[row, :count], np.stack(outs[row]), 2e-5)
    assert cache.length.tolist() == (np.array(LENGTHS) + counts).tolist()


def test_memory_does_not_grow_with_the_answer(tmp_path: pathlib.Path):
    """`generate` keeps the same bytes however long the answer is, also with a restored cache."""
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=400)
    method = Method(scorer=H2O(), heavy=8, recent=8, evict_every=4)
    prompts = [list(range(40)), list(range(50, 59))]
    short, long = (generate(model, prompts, method=method, max_new_tokens=n, eos_token_ids=()) for n in (30, 200))
    assert short.cache.nbytes == long.cache.nbytes
    assert short.tokens.tolist() == long.tokens[:, :30].tolist()
    assert int(long.cache.kept_tokens.max()) < 20
    assert long.cache.length.tolist() == [240, 209]
    save_cache(short.cache, tmp_path / "cache")
    restored = restore_cache(tmp_path / "cache", model.config)
    more = [[7, 8, 9]] * 2
    on, again = (generate(model, more, cache=cache, max_new_tokens=20) for cache in (short.cache, restored))
    assert on.tokens.tolist() == again.tokens.tolist()
    assert on.cache.nbytes == long.cache.nbytes


def test_variance_grants_counts_beyond_the_prompt():
    """A fixed number of heavy tokens is reached as the answer grows, with any budget rule."""
    method = Method(scorer=H2O(), heavy=16, recent=4, budget=Variance(), evict_every=1)
    scores = [jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8))]
    assert budgets_from_scores(method, scores, jnp.asarray([8])).tolist() == [[16], [16]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evict_every": 0}, "evict_every=0: expected an integer in 1..16777216"),
        ({"evict_every": 0.5}, "evict_every=0.5: expected an integer"),
        ({"evict_every": 8, "quantizer": MinMax()}, "evict_every=8 with MinMax: only full-precision tokens"),
        ({"evict_every": 8, "heavy": 0.0, "recent": 1.0}, "evict_every=8 with recent=1.0: there is no budget"),
        ({"evict_every": 8, "scorer": SnapKV()}, "evict_every=8 with SnapKV: expected a scorer that .* H2O or TOVA"),
    ],
)
def test_what_cannot_evict_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(lookup.get("h2o"), **fields)


def a_layer(method: Method) -> LayerCache:
    rng = np.random.default_rng(3)
    return cache_of(method, normal(rng, 1, 40, 2, 16), normal(rng, 1, 40, 2, 16), np.array([40]), 4)


def test_kernels_and_windows_are_refused_by_name():
    method, q = METHODS["h2o-counts"], jnp.zeros((1, 4, 16))
    with pytest.raises(NotImplementedError, match="decode_attention_weights: no 'cuda' kernel"):
        decode_attention_weights(q, a_layer(Method()), implementation="cuda")
    with pytest.raises(
        ValueError, match=r"quantizer=MinMax\(.*\), window=None: weights are of full-precision tails only"
    ):
        decode_attention_weights(q, a_layer(lookup.get("minikv")))
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(NotImplementedError, match="evict_every=7: only this library's own models"):
        prefill_layer(LayerInputs(x, x, x, jnp.array([8])), method, 4)
    with pytest.raises(ValueError, match=r"evict_every=7: a layer with a sliding window \(8\)"):
        contracts.check(method, tiny_config(model_type="mistral", sliding_window=8))


class Decaying(H2O):
    """Scorer with a sum in which the past decays."""

    share_kept: float = 0.5

    def update(self, scores: jax.Array, weights: jax.Array) -> jax.Array:
        return self.share_kept * scores + weights


class Short(H2O):
    """Scorer that breaks the contract: it always returns the same number of scores."""

    def update(self, scores: jax.Array, weights: jax.Array) -> jax.Array:
        del scores, weights
        return jnp.zeros(3)


def test_a_scorer_of_ones_own_goes_on():
    """`update` is used with its settings, and refused if it breaks its contract."""
    method = Method(scorer=Decaying(share_kept=0.25), heavy=4, recent=2, evict_every=100)
    layer = a_layer(Method())
    scores, weights = normal(np.random.default_rng(4), 2, *layer.tail.k.shape[:3])
    state = Eviction(jnp.asarray(scores), jnp.array([4]), jnp.array([2]))
    layer = dataclasses.replace(layer, spec=LayerSpec(method), eviction=state)
    after = evict(layer, state, jnp.asarray(weights), jnp.array([1])).eviction
    assert after is not None
    assert after.scores is not None
    assert_close(after.scores[:, :, :40], (0.25 * scores + weights)[:, :, :40])
    np.testing.assert_array_equal(after.scores[:, :, 40:], scores[:, :, 40:])
    contracts.check(method, tiny_config())
    short = dataclasses.replace(method, scorer=Short())
    with pytest.raises(ValueError, match=r"scorer 'Short': update returns float32\[3\] .*: expected .*\[B, K, C\]"):
        contracts.check(short, tiny_config())
