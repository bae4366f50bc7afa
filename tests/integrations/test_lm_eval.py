"""Tests the language model for the lm-evaluation-harness against the harness's own and against direct evaluation."""

import copy
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import tiny_model
from transformers import PreTrainedTokenizerBase

import minikv_jax as mk
from minikv_jax.integrations.lm_eval import CompressedLM
from minikv_jax.methods import lookup
from minikv_jax.models.decoder import Llama
from minikv_jax.models.hub import load

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

TEXT = "The lamp was lit at dusk and burned until the morning, when the keeper put it out. "
CONTEXTS = (TEXT * 2, TEXT + "Then ", "")
CONTINUATIONS = ("it rained", "no", " the keeper slept until noon")
Loaded = tuple[Llama, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(model_directory: pathlib.Path) -> Loaded:
    model, tokenizer = load(model_directory)
    assert tokenizer is not None
    return model, tokenizer


def requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, values, 0) for values in arguments]


PAIRS = requests("loglikelihood", [(context, text) for context in CONTEXTS for text in CONTINUATIONS])


def test_full_agrees_with_the_harness_model_of_transformers(model_directory: pathlib.Path, loaded: Loaded):
    make: Any = HFLM
    theirs = make(pretrained=str(model_directory), device="cpu", dtype="float32", batch_size=4)
    ours = CompressedLM(*loaded, "full", batch_size=4)
    texts = requests("loglikelihood_rolling", [(TEXT * 2,), ("",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    for (total, greedy), (expected, their_greedy) in zip(
        ours.loglikelihood(PAIRS), theirs.loglikelihood(PAIRS), strict=True
    ):
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == their_greedy
    prompts = requests("generate_until", [(text or "?", {"max_gen_toks": 20, "until": ["E"]}) for text in CONTEXTS])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
    assert (ours.cut, ours.not_finite) == (0, 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compress(model: Any, method: mk.Method, params: Any, ids: jax.Array) -> mk.KVCache:
    return mk.prefill(nnx.merge(model, params), ids, jnp.asarray([ids.shape[1]]), method, 64)[1]


@functools.partial(jax.jit, static_argnums=0)
def step(model: Any, params: Any, cache: mk.KVCache, token: jax.Array) -> tuple[jax.Array, mk.KVCache]:
    return mk.decode(nnx.merge(model, params), cache, token, jnp.ones(1, jnp.int32))


def direct_likelihood(model: Llama, method: mk.Method, context: list[int], continuation: list[int]) -> float:
    """Compresses the context without its last token, and decodes the rest token by token."""
    split, total = nnx.split(model), 0.0
    cache = compress(split[0], method, split[1], jnp.asarray([context[:-1]]))
    for fed, wanted in zip([context[-1], *continuation], continuation, strict=False):
        hidden, cache = step(*split, cache, jnp.asarray([fed]))
        total += float(jax.nn.log_softmax(model.logits(hidden))[0, wanted])
    return total


@pytest.mark.parametrize("name", ["minikv", pytest.param("h2o:evict_every=1,sinks=2", marks=pytest.mark.slow)])
def test_continuations_are_scored_from_the_compressed_context(loaded: Loaded, name: str):
    model, tokenizer = loaded
    method = mk.lookup.parse(name)
    scores = CompressedLM(*loaded, method, batch_size=4).loglikelihood(PAIRS[:5])
    context = tokenizer.encode(CONTEXTS[0])
    for (total, _), text in zip(scores[:3], CONTINUATIONS, strict=True):
        # The harness moves the space at the end of a context to the continuation.
        expected = direct_likelihood(model, method, context[:-1], [context[-1], *tokenizer.encode(text)])
        assert total == pytest.approx(expected, abs=1e-3)
    alone = CompressedLM(*loaded, method).loglikelihood(PAIRS[:2])
    assert [total for total, _ in alone] == pytest.approx([total for total, _ in scores[:2]], abs=1e-4)


def test_a_text_is_scored_in_strides_from_what_is_compressed_before(loaded: Loaded):
    lm = CompressedLM(*loaded, "minikv", stride=64)
    ids = lm.tok_encode(TEXT * 2)
    before = [lm.prefix_token_id, *ids]
    parts = [(None, before[: start + 1], ids[start : start + 64]) for start in range(0, len(ids), 64)]
    assert len(parts) == 3
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT * 2,)]))
    assert total == pytest.approx(sum(score for score, _ in lm._loglikelihood_tokens(parts)), abs=1e-6)
    exact = CompressedLM(*loaded, "full", stride=64).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(TEXT * 2,)])
    )
    assert abs(total - exact[0]) > 0.1


def test_answers_are_those_of_generate_up_to_a_stop_string(loaded: Loaded):
    model, tokenizer = loaded
    prompts = [TEXT * 2, TEXT, TEXT + TEXT[:40]]
    lm = CompressedLM(*loaded, "minikv", batch_size=2)
    result = mk.generate(model, [tokenizer.encode(text) for text in prompts], method="minikv", max_new_tokens=24)
    whole = [
        str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        for ids, length in zip(np.asarray(result.tokens).tolist(), np.asarray(result.lengths).tolist(), strict=True)
    ]
    asked = [(text, {"max_gen_toks": 24, "until": []}) for text in prompts]
    assert lm.generate_until(requests("generate_until", asked)) == whole
    stop = whole[1][5]
    asked = [(text, {"max_gen_toks": 24, "until": [stop, "never"], "do_sample": False}) for text in prompts]
    assert lm.generate_until(requests("generate_until", asked)) == [text.split(stop)[0] for text in whole]


def test_sampling_draws_anew_for_every_batch(loaded: Loaded):
    how = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    first, second = (
        CompressedLM(*loaded, "full", seed=3).generate_until(requests("generate_until", [(TEXT, how)] * 2))
        for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]


def test_a_context_that_does_not_fit_loses_its_middle(loaded: Loaded):
    lm = CompressedLM(*loaded, "full", context=80)
    ids = lm.tok_encode(TEXT * 3)
    pair = (("", ""), ids, [5, 6])
    cut = (("", ""), [*ids[:40], *ids[-40:]], [5, 6])
    scores = lm._loglikelihood_tokens([pair, cut])
    assert scores[0] == scores[1]
    assert lm.cut == 1
    small = tiny_model(vocab_size=259, max_position_embeddings=48)
    drafts = CompressedLM(small, loaded[1], lookup.parse("snapkv:heavy=8,recent=8,lookahead=20"))
    assert drafts.generate_until(requests("generate_until", [(TEXT, {"max_gen_toks": 2})]))[0]
    assert drafts.cut == 1  # a draft takes positions too
    by_positions = CompressedLM(small, loaded[1], "full")
    (answer,) = by_positions.generate_until(requests("generate_until", [(TEXT, {"max_gen_toks": 16})]))
    assert by_positions.cut == 1
    assert answer
    with pytest.raises(ValueError, match="48 positions"):
        by_positions.generate_until(requests("generate_until", [(TEXT, {"max_gen_toks": 48})]))


def test_wrong_values_are_named(loaded: Loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="no tokenizer"):
        CompressedLM(model, None)
    with pytest.raises(ValueError, match="batch_size=0"):
        CompressedLM(model, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="group_size"):
        CompressedLM(model, tokenizer, mk.lookup.parse("minikv:group_size=64"))
    lm = CompressedLM(model, tokenizer)
    for how, message in (({"num_beams": 3}, "num_beams=3"), ({"penalty_alpha": 0.1}, "penalty_alpha")):
        with pytest.raises(ValueError, match=message):
            lm.generate_until(requests("generate_until", [(TEXT, how)]))
    bare = CompressedLM(tiny_model(vocab_size=259), _without_end(tokenizer))
    with pytest.raises(ValueError, match="end-of-sequence"):
        bare.loglikelihood(PAIRS[-1:])


def _without_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    return other


def test_not_finite_logits_are_counted(loaded: Loaded):
    model = tiny_model(vocab_size=259, max_position_embeddings=256)
    scale = model.norm.scale
    assert scale is not None
    scale[...] = scale[...].at[0].set(jnp.nan)
    lm = CompressedLM(model, loaded[1], "full")
    lm.loglikelihood(PAIRS[3:4])
    lm.generate_until(requests("generate_until", [(TEXT, {"max_gen_toks": 4})]))
    assert lm.not_finite == 2


def test_chat_templates_open_a_reply_or_leave_the_last_turn_open(loaded: Loaded):
    lm = CompressedLM(*loaded)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert lm.apply_chat_template(turns[:1]) == "<|user|>Hi<|end|>\n<|assistant|>"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "<|user|>Hi<|end|>\n<|assistant|>Well"
    assert lm.tok_encode("<|end|>a") == [lm.eot_token_id, *lm.tok_encode("a")]
