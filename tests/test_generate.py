"""Tests `generate`, `stream` and `compile_ahead`: their tokens and caches, and what they refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax import programs
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.prompts import bucket_length

VOCABULARY = 96
NEW = 70  # new tokens if the number does not matter, so that tests share programs; two tails of `MINIKV32`
FULL = lookup.get("full")
MINIKV32 = dataclasses.replace(lookup.get("minikv"), tail=Tail(length=32))
KIVI = Method(quantizer=MinMax(k_bits=4), tail=Tail(length=32, rule="kivi"))


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=512)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def tokens(model: mk.Llama, rows: list[list[int]], **settings: Any) -> np.ndarray:
    return np.asarray(mk.generate(model, rows, eos_token_ids=(), **settings).tokens)


@pytest.mark.parametrize("method", [FULL, MINIKV32, KIVI], ids=["full", "minikv", "kivi"])
def test_ragged_batch_equals_single_runs(model: mk.Llama, method: Method):
    """Rows of a batch flush their tails at different steps and still agree with single runs."""
    rows = prompts(3, 61, 64, 40)
    together = tokens(model, rows, method=method, max_new_tokens=NEW)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_array_equal(tokens(model, [row], method=method, max_new_tokens=NEW)[0], expected)


@pytest.mark.parametrize("method", [FULL, MINIKV32], ids=["full", "minikv"])
def test_another_bucket_gives_the_same_tokens(model: mk.Llama, method: Method):
    short, long = prompts(50, 150)
    alone = tokens(model, [short], method=method, max_new_tokens=NEW)
    beside = tokens(model, [short, long], method=method, max_new_tokens=NEW)
    assert bucket_length(50) != bucket_length(150)
    np.testing.assert_array_equal(alone[0], beside[0])


def count_traces(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Returns a list that grows with every trace of a function of `programs`; compiled calls run no Python."""
    traces: list[int] = []
    original = getattr(programs, name)

    def counted(*arguments: Any) -> Any:
        traces.append(1)
        return original(*arguments)

    monkeypatch.setattr(programs, name, counted)
    return traces


def test_padding_stays_within_the_models_positions():
    model = tiny_model(max_position_embeddings=300)
    (row,) = prompts(290)
    assert bucket_length(290) == 320
    whole = tokens(tiny_model(max_position_embeddings=512), [row], method="full", max_new_tokens=10)
    np.testing.assert_array_equal(tokens(model, [row], method="full", max_new_tokens=10), whole)


def test_second_call_does_not_retrace(model: mk.Llama, monkeypatch: pytest.MonkeyPatch):
    """Other lengths in the same bucket and a batch given as an array do not retrace either."""
    traces = count_traces(monkeypatch, "prefill")
    drawn = [tokens(model, prompts(length, seed=length), max_new_tokens=21) for length in (33, 64, 50)]
    again = mk.generate(model, jnp.asarray(prompts(50, seed=50)), max_new_tokens=21, eos_token_ids=()).tokens
    assert len(traces) == 1
    np.testing.assert_array_equal(again, drawn[-1])


@pytest.mark.parametrize("method", [FULL, MINIKV32], ids=["full", "minikv"])
def test_continuing_a_cache(model: mk.Llama, method: Method, monkeypatch: pytest.MonkeyPatch):
    """A returned cache holds all generated tokens; under `full`, continuing it equals one long run."""
    rows = prompts(50, 20)
    first = mk.generate(model, rows, method=method, max_new_tokens=20, eos_token_ids=())
    assert first.cache.length.tolist() == [70, 40]
    turn = prompts(5, 9, seed=2)
    traces = count_traces(monkeypatch, "extend")
    second = mk.generate(model, turn, cache=first.cache, max_new_tokens=30, eos_token_ids=())
    assert len(traces) == 1
    assert second.cache.length.tolist() == [105, 79]
    if method is FULL:
        history = [row + new.tolist() + more for row, new, more in zip(rows, first.tokens, turn, strict=True)]
        np.testing.assert_array_equal(second.tokens, tokens(model, history, method=method, max_new_tokens=30))


def test_stops_at_end_of_sequence(model: mk.Llama):
    (row,) = prompts(30)
    free = tokens(model, [row], method="full", max_new_tokens=NEW)[0]
    stop = int(free[11])
    expected = free.tolist().index(stop) + 1
    result = mk.generate(model, [row], method="full", max_new_tokens=NEW, eos_token_ids=(stop,))
    assert result.lengths.tolist() == [expected]
    assert result.tokens[0, :expected].tolist() == free[:expected].tolist()
    assert not np.any(result.tokens[0, expected:])
    assert result.cache.length.tolist() == [30 + expected]


def test_sampling_is_seeded_and_obeys_its_limits(model: mk.Llama):
    (row,) = prompts(30)

    def draw(seed: int, **limits: Any) -> list[int]:
        sampling = mk.Sampling(temperature=1.5, **limits)
        settings: dict[str, Any] = {"sampling": sampling, "key": jax.random.key(seed)}
        return tokens(model, [row], method=MINIKV32, max_new_tokens=NEW, **settings)[0].tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    greedy = tokens(model, [row], method=MINIKV32, max_new_tokens=NEW)[0].tolist()
    assert draw(0) != greedy
    assert draw(0, top_k=1) == greedy


WRONG = {
    "method": ({"method": "h3o"}, "method 'h3o': expected one of .*minikv"),
    "no method": ({"method": 5}, "method is a int: expected a Method or a method's name"),
    "implementation": ({"implementation": "triton"}, "'triton'.*xla"),
    "empty prompt": ({"prompts": [[1], []]}, r"prompt 1 has shape \(0,\)"),
    "no prompts": ({"prompts": []}, "prompts is empty"),
    "no sequence": ({"prompts": 5}, "prompts=5: expected sequences"),
    "text": ({"prompts": "ab"}, "prompts='ab': expected sequences"),
    "nested ids": ({"prompts": [[1, [2]]]}, "prompt 0 is no sequence of token ids"),
    "token id": ({"prompts": [[1, VOCABULARY]]}, r"token id 96: expected 0\.\.95"),
    "negative id": ({"prompts": [[-1]]}, "token id -1"),
    "float ids": ({"prompts": [[1.5]]}, "float64"),
    "positions": ({"prompts": [[1] * 500]}, "500 prompt tokens . 13 new ones exceed the model's 512 positions"),
    "new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: expected an integer"),
    "yes tokens": ({"max_new_tokens": True}, "max_new_tokens=True: expected an integer"),
    "stop token": ({"eos_token_ids": 2}, r"eos_token_ids=2: expected a sequence of token ids, 0\.\.95"),
    "foreign stop token": ({"eos_token_ids": [VOCABULARY]}, r"eos_token_ids=\[96\]: expected"),
    "half a stop token": ({"eos_token_ids": [1.5]}, r"eos_token_ids=\[1.5\]: expected"),
    "cache": ({"cache": 5}, "cache is a int: expected an earlier result's cache"),
    "method for a cache": ({"cache": "full"}, "cache is a str: expected an earlier result's cache"),
    "sampling": ({"sampling": "greedy"}, "sampling='greedy': expected a minikv_jax.Sampling"),
    "key": ({"sampling": mk.Sampling(temperature=1.0), "key": 5}, "key=5: expected a PRNG key"),
    "no key": ({"sampling": mk.Sampling(temperature=1.0)}, "key=None"),
    "group": ({"method": "kivi-2"}, "head_dim 16 is not divisible by group_size 32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(model: mk.Llama, case: str):
    changes, message = WRONG[case]
    arguments: dict[str, Any] = {"prompts": [[1, 2, 3]], "max_new_tokens": 13, **changes}
    with pytest.raises(ValueError, match=message):
        mk.generate(model, arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize("name", ["pallas", "cuda"])
def test_a_kernel_by_name_runs_or_raises(model: mk.Llama, name: str):
    with pytest.raises(NotImplementedError, match=f"(?i){name}"):
        mk.generate(model, prompts(20), implementation=name)


def test_a_foreign_cache_is_refused(model: mk.Llama):
    cache = mk.generate(model, prompts(20), method="full", max_new_tokens=NEW, eos_token_ids=()).cache
    with pytest.raises(ValueError, match="cache has 1 rows, prompts 2"):
        mk.generate(model, prompts(3, 3), cache=cache)
    with pytest.raises(ValueError, match="layers, KV heads, head dim"):
        mk.generate(tiny_model(num_hidden_layers=3), prompts(3), cache=cache)
    with pytest.raises(ValueError, match="cache has dtype float32, the model bfloat16"):
        mk.generate(tiny_model(dtype="bfloat16"), prompts(3), cache=cache)
    with pytest.raises(ValueError, match=r"90 tokens of the cache \+ 300 prompt tokens \+ 200 new ones exceed"):
        mk.generate(model, prompts(300), cache=cache, max_new_tokens=200)
    for method in ("full", FULL):
        with pytest.raises(ValueError, match="both method and cache are given: a cache goes on with its own method"):
            mk.generate(model, prompts(3), method=method, cache=cache)
    with pytest.raises(ValueError, match="method is a KVCache: expected a Method or a method's name"):
        mk.generate(model, prompts(3), method=cache)  # pyright: ignore[reportArgumentType]
    mk.generate(model, prompts(3), cache=cache, max_new_tokens=4)
    with pytest.raises(ValueError, match="cache was donated to another call"):
        mk.generate(model, prompts(3), cache=cache, max_new_tokens=4)


def test_a_model_is_asked_for():
    with pytest.raises(ValueError, match="model is a str: expected a Llama"):
        mk.generate("llama", prompts(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="model is a str: expected a Llama"):
        mk.compile_ahead("llama", 1, 20)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["minikv", "h2o", "minikv-variance"])
def test_numbers_of_64_bits_change_nothing(model: mk.Llama, name: str):
    method = dataclasses.replace(lookup.get(name), evict_every=4 if name == "h2o" else None)
    expected = tokens(model, prompts(40, 9), method=method, max_new_tokens=20)
    with jax.enable_x64(True):
        model = tiny_model(max_position_embeddings=512)
        np.testing.assert_array_equal(tokens(model, prompts(40, 9), method=method, max_new_tokens=20), expected)


SAMPLED: dict[str, Any] = {"sampling": mk.Sampling(temperature=1.0)}


@pytest.mark.parametrize("settings", [{}, SAMPLED | {"key": jax.random.key(3)}], ids=["greedy", "sampled"])
def test_stream_draws_what_generate_draws(model: mk.Llama, settings: dict[str, Any]):
    rows = prompts(50, 20)
    whole = mk.generate(model, rows, max_new_tokens=25, log_probabilities=True, **settings)
    seen, last = [], whole
    for last in mk.stream(model, rows, max_new_tokens=25, log_probabilities=True, chunk=10, **settings):
        seen.append(last.lengths.tolist())
    assert seen == [[0, 0], [10, 10], [20, 20], [25, 25]]
    jax.tree.map(np.testing.assert_array_equal, last, whole)
    with pytest.raises(ValueError, match="chunk=0"):
        mk.stream(model, rows, chunk=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        mk.stream(model, [])


def test_programs_compiled_ahead_draw_what_generate_draws(model: mk.Llama):
    """Programs compiled from shapes, even the model's, serve any prompts of the bucket."""
    rows, key = prompts(50, 20), jax.random.key(3)
    shapes = nnx.eval_shape(lambda: tiny_model(max_position_embeddings=512))
    ahead = mk.compile_ahead(shapes, 2, 50, max_new_tokens=25, log_probabilities=True, **SAMPLED)
    assert ahead.compile_s.keys() == {"prefill", "decode"}
    params = nnx.split(model)[1]
    ids, lengths = np.zeros((2, 64), np.int32), np.array([50, 20], np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    state = ahead.prefill(params, None, ids, lengths, key)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, ahead.state)
    for last in (10, 25):
        state = ahead.decode(params, state, np.int32(last))
    whole = mk.generate(model, rows, max_new_tokens=25, log_probabilities=True, key=key, **SAMPLED)
    jax.tree.map(np.testing.assert_array_equal, state.result(), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"prompt_tokens": 1.5}, "prompt_tokens=1.5: expected an integer"),
        ({"prompt_tokens": 500}, "500 prompt tokens . 128 new ones exceed the model's 512 positions"),
        ({"max_new_tokens": "8"}, "max_new_tokens='8': expected an integer"),
        ({"method": "h3o"}, "method 'h3o': expected one of .*minikv"),
        ({"implementation": "triton"}, "implementation='triton'.*xla"),
    ],
)
def test_what_cannot_be_compiled_ahead_is_named(model: mk.Llama, changes: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"batch": 1, "prompt_tokens": 20} | changes
    with pytest.raises(ValueError, match=message):
        mk.compile_ahead(model, **arguments)


def test_stream_compiles_before_it_returns(model: mk.Llama, caplog: pytest.LogCaptureFixture):
    """Its steps take the time of prefill and decoding, also if a cache is continued."""
    cache = None
    for compiled in (("start", "decode_until"), ("start",)):  # the loop's shapes are known the second time
        with jax.log_compiles():
            results = mk.stream(model, prompts(21), cache=cache, max_new_tokens=7, chunk=4)
            for program in compiled:
                assert f"Compiling jit({program})" in caplog.text
            caplog.clear()
            for result in results:
                cache = result.cache
        for program in ("start", "decode_until"):
            assert f"Compiling jit({program})" not in caplog.text
        caplog.clear()


def test_log_probabilities_are_the_models(model: mk.Llama):
    (row,) = prompts(40)
    result = mk.generate(model, [row], method="full", max_new_tokens=12, eos_token_ids=(), log_probabilities=True)
    generated = result.tokens[0].tolist()
    expected = jax.nn.log_softmax(jax.jit(mk.one_shot)(model, jnp.asarray([row + generated]))[0, 39:-1])
    assert result.log_probabilities is not None
    drawn = np.asarray(result.log_probabilities[0])
    np.testing.assert_allclose(drawn, [line[token] for line, token in zip(expected, generated, strict=True)], atol=2e-5)
    without = mk.generate(model, [row], method="full", max_new_tokens=NEW, eos_token_ids=())
    assert without.log_probabilities is None


def test_non_finite_logits_are_reported_per_row():
    """The first row never meets NaN, the second has it in its prompt, the third ends before drawing from it."""
    model = tiny_model(max_position_embeddings=512)
    bad, rows = 7, [[1, 2, 3], [1, 7, 3], [4, 5, 6]]
    free = mk.generate(model, rows, max_new_tokens=9, method="full", eos_token_ids=())
    assert free.finite.tolist() == [True, True, True]
    assert bad not in np.asarray(free.tokens)
    stop = int(free.tokens[2, 0])
    weights = model.embed_tokens.embedding[...]
    model.embed_tokens.embedding[...] = weights.at[bad].set(jnp.nan).at[stop].set(jnp.inf)
    assert stop not in np.asarray(free.tokens[0])
    result = mk.generate(model, rows, max_new_tokens=9, method="full", eos_token_ids=(stop,))
    assert result.lengths[2] == 1
    assert result.finite.tolist() == [True, False, True]
    *_, last = mk.stream(model, rows, max_new_tokens=9, method="full", eos_token_ids=())
    assert last.finite.tolist() == [True, False, False]
