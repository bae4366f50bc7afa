"""Tests teacher-forced and greedy runs of several methods after one prefill."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

from minikv_jax.evaluation import Case, measure
from minikv_jax.evaluation.measure import measure_each
from minikv_jax.generate import generate
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Tail
from minikv_jax.models.decoder import Llama
from minikv_jax.one_shot import one_shot
from minikv_jax.prefill import prefill

COARSE = dataclasses.replace(
    lookup.get("minikv"), name="coarse", quantizer=MinMax(k_bits=1, v_bits=1, group_size=16), tail=Tail(length=32)
)
METHODS = {"full": lookup.get("full"), "coarse": COARSE}
PREFILL = jax.jit(prefill, static_argnums=(3, 4))
ROOM = 40  # one size, and prompts of 65 to 80 tokens: the tests share compiled programs


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=256)


def random_case(seed: int, prompt: int, continuation: int, **fields: Any) -> Case:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 96, prompt + continuation).tolist()
    return dataclasses.replace(Case(f"case {seed}", tuple(ids[:prompt]), tuple(ids[prompt:])), **fields)


def test_full_is_the_models_own_likelihood(model: Llama):
    case = random_case(0, 70, 21)
    (results,) = measure(model, [case], METHODS, ROOM)
    full, other = results.values()
    logits = jax.nn.log_softmax(one_shot(model, jnp.asarray([case.prompt + case.continuation]))[0])
    expected = -float(np.mean([logits[69 + i, token] for i, token in enumerate(case.continuation)]))
    assert full.nll == pytest.approx(expected, abs=1e-5)
    assert full.full_nll == other.full_nll == full.nll
    assert full.kl_to_full == 0
    assert full.top1_agreement == 1
    assert full.cache_bytes == full.full_cache_bytes == other.full_cache_bytes
    assert other.cache_bytes < full.cache_bytes
    assert other.kl_to_full is not None
    assert other.kl_to_full > 1e-6
    assert other.nll != full.nll


def test_shared_prefill_is_each_methods_own_run(model: Llama):
    """Greedy answers and bytes equal those of `generate`, which runs its own prefill."""
    case = random_case(1, 75, 12, max_new_tokens=ROOM)
    (results,) = measure(model, [case], METHODS, ROOM)
    for name, method in METHODS.items():
        alone = generate(model, [case.prompt], method=method, max_new_tokens=ROOM, eos_token_ids=())
        assert results[name].generated == tuple(alone.tokens[0].tolist())
        assert results[name].cache_bytes == alone.cache.nbytes


def test_exact_match_is_greedy_generation(model: Llama):
    prompt = random_case(2, 70, 0).prompt
    greedy = {
        name: tuple(generate(model, [prompt], method=method, max_new_tokens=ROOM, eos_token_ids=()).tokens[0].tolist())
        for name, method in METHODS.items()
    }
    assert greedy["full"] != greedy["coarse"]
    for text in ("full", "coarse"):
        (results,) = measure(model, [Case("greedy", prompt, greedy[text])], METHODS, ROOM)
        assert {name: result.exact_match for name, result in results.items()} == {
            name: tokens == greedy[text] for name, tokens in greedy.items()
        }


def test_a_batch_of_uneven_cases_is_each_case_alone(model: Llama):
    cases = [
        random_case(3, 80, 0, max_new_tokens=7),
        random_case(4, 75, 9, max_new_tokens=3),
    ]
    together = measure(model, cases, METHODS, ROOM)
    for case, results in zip(cases, together, strict=True):
        (alone,) = measure(model, [case], METHODS, ROOM)
        for name, result in results.items():
            expected = dataclasses.asdict(alone[name])
            assert dataclasses.asdict(result) == {
                key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
                for key, value in expected.items()
            }
    assert together[0]["full"].nll is None
    assert together[1]["full"].generated is not None


def test_generation_ends_at_a_stop_token(model: Llama):
    (free,) = measure(model, [random_case(6, 70, 0, max_new_tokens=ROOM)], METHODS, ROOM)
    tokens = free["coarse"].generated
    assert tokens is not None
    assert len(tokens) == ROOM
    for stop in {*tokens}:
        (ended,) = measure(model, [random_case(6, 70, 0, max_new_tokens=ROOM, stop=(stop,))], METHODS, ROOM)
        assert ended["coarse"].generated == tokens[: tokens.index(stop)]


def test_nan_is_reported_and_stays_in_its_row(model: Llama):
    """One token of a continuation embeds to NaN and affects only its row."""
    poisoned = tiny_model(max_position_embeddings=256)
    embedding = poisoned.embed_tokens.embedding
    embedding[...] = embedding[...].at[95].set(jnp.nan)
    clean = dataclasses.replace(random_case(7, 70, 5), prompt=(1,) * 70, continuation=(2,) * 5)
    dirty = dataclasses.replace(clean, name="dirty", continuation=(2, 95, 2, 2, 2))
    first, second = measure(poisoned, [clean, dirty], METHODS, ROOM)
    for name in METHODS:
        assert first[name].finite
        assert first[name].nll is not None
        assert not second[name].finite
        assert second[name].nll is None
        assert second[name].exact_match is None
        assert second[name].cache_bytes > 0


def test_wrong_cases_are_named(model: Llama):
    with pytest.raises(ValueError, match=r"case 0: 5 prompt and 0 new tokens"):
        measure(model, [random_case(0, 5, 0)], METHODS, 1)
    with pytest.raises(ValueError, match=r"250 prompt . 10 new tokens exceed the model's 256 positions"):
        measure(model, [random_case(0, 250, 10)], METHODS, 10)
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary of 96"):
        measure(model, [Case("x", (96,), (1,))], METHODS, 1)
    wide = dataclasses.replace(COARSE, quantizer=MinMax(k_bits=1, v_bits=1, group_size=32))
    with pytest.raises(ValueError, match="head_dim 16"):
        measure(model, [random_case(0, 5, 1)], {"x": wide}, 1)


def test_questions_share_a_prompt_that_methods_compress_without_them(model: Llama):
    """Greedy answers equal those of `generate`, which goes on from a cache of the prompt alone."""
    prompt = random_case(8, 75, 0).prompt
    questions = [random_case(seed, size, 0).prompt for seed, size in ((9, 5), (10, 17), (11, 3))]
    cases = [Case(f"{i}", prompt, max_new_tokens=12, question=asked) for i, asked in enumerate(questions)]
    evicting = dataclasses.replace(lookup.get("tova"), evict_every=1)
    methods = METHODS | {"evicting": evicting}
    together = measure(model, cases, methods, ROOM)
    for name, method in methods.items():
        by_twos = dict(measure_each(model, cases, {name: method}, ROOM, None, 2))[name]
        for case, results, result in zip(cases, together, by_twos, strict=True):
            assert results[name].generated == result.generated
            _, cache = PREFILL(model, jnp.asarray([prompt]), jnp.asarray([len(prompt)]), method, ROOM)
            alone = generate(model, [case.question], cache=cache, max_new_tokens=12, eos_token_ids=())
            assert result.generated == tuple(alone.tokens[0].tolist())


def test_questions_about_several_prompts_are_refused(model: Llama):
    several = [dataclasses.replace(random_case(seed, 70, 2), question=(1, 2)) for seed in (1, 2)]
    for cases in (several, [several[0], dataclasses.replace(several[0], question=())]):
        with pytest.raises(ValueError, match=r"^cases with questions: expected .* all about one prompt$"):
            measure(model, cases, METHODS, ROOM)
