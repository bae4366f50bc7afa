"""The compiled loop: what it must equal, what it must refuse, and what it must not allocate."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax import inference
from minikv_jax.cache import memory
from minikv_jax.generate import _decode_chunk, _generate, _prefill_only, _Settings, bucket_length
from minikv_jax.inference import last_valid
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.config import ModelConfig
from minikv_jax.sampling import sample

VOCABULARY = 96
MINIKV16 = dataclasses.replace(presets.get("minikv"), residual_length=32)


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=512)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def tokens(model: mk.Llama, rows: list[list[int]], **settings: Any) -> np.ndarray:
    return np.asarray(mk.generate(model, rows, eos_token_ids=(), **settings).tokens)


def test_full_equals_one_shot_forward(model: mk.Llama):
    """Stepwise decode under `full` gives the logits of one pass over the whole sequence."""
    (row,) = prompts(37)
    generated = tokens(model, [row], cache="full", max_new_tokens=40)[0].tolist()
    one_shot = inference.one_shot(model, jnp.asarray([row + generated]))
    hidden, cache = inference.prefill(model, jnp.asarray([row]), jnp.asarray([37]), presets.get("full"), 40)
    steps = [model.logits(hidden)]
    for token in generated[:-1]:
        hidden, cache = inference.decode(model, cache, jnp.asarray([token]), jnp.ones(1, jnp.int32))
        steps.append(model.logits(hidden))
    # The two sum in another order; logits here are of size 1, float32 rounds at 1e-7 of that per operation.
    np.testing.assert_allclose(jnp.stack(steps, axis=1), one_shot[:, 36:-1], atol=2e-5)
    assert generated == jnp.argmax(one_shot[0, 36:-1], axis=-1).tolist()


def test_extend_equals_one_shot_forward(model: mk.Llama):
    first, second = prompts(70, 31)
    _hidden, cache = inference.prefill(model, jnp.asarray([first]), jnp.asarray([70]), presets.get("full"), 31)
    extended, cache = inference.extend(model, cache, jnp.asarray([second]), jnp.asarray([31]))
    one_shot = inference.one_shot(model, jnp.asarray([first + second]))
    np.testing.assert_allclose(model.logits(extended), one_shot[:, 70:], atol=2e-5)
    assert int(cache.length[0]) == 101


@pytest.mark.parametrize("method", ["full", "minikv", "kivi"])
def test_ragged_batch_equals_single_runs(model: mk.Llama, method: str):
    """Rows of a batch roll their tails over at different steps and still agree with single runs."""
    kivi = CacheConfig(k_bits=4, v_bits=2, residual="kivi", residual_length=32)
    config = {"full": presets.get("full"), "minikv": MINIKV16, "kivi": kivi}[method]
    rows = prompts(3, 61, 64, 40)
    together = tokens(model, rows, cache=config, max_new_tokens=70)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_array_equal(tokens(model, [row], cache=config, max_new_tokens=70)[0], expected)


@pytest.mark.parametrize("method", [presets.get("full"), MINIKV16])
def test_another_bucket_gives_the_same_tokens(model: mk.Llama, method: CacheConfig):
    short, long = prompts(50, 150)
    alone = tokens(model, [short], cache=method, max_new_tokens=40)
    beside = tokens(model, [short, long], cache=method, max_new_tokens=40)
    assert bucket_length(50) != bucket_length(150)
    np.testing.assert_array_equal(alone[0], beside[0])


def count_traces(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Appends to the list each time that `inference.<name>` is traced: compiled calls do not run Python."""
    traces: list[int] = []
    original = getattr(inference, name)

    def counted(*arguments: Any) -> Any:
        traces.append(1)
        return original(*arguments)

    monkeypatch.setattr(inference, name, counted)
    return traces


def test_padding_stays_within_the_models_positions():
    model = tiny_model(max_position_embeddings=300)
    (row,) = prompts(290)
    assert bucket_length(290) == 320
    whole = tokens(tiny_model(max_position_embeddings=512), [row], cache="full", max_new_tokens=10)
    np.testing.assert_array_equal(tokens(model, [row], cache="full", max_new_tokens=10), whole)


def test_second_call_does_not_retrace(model: mk.Llama, monkeypatch: pytest.MonkeyPatch):
    traces = count_traces(monkeypatch, "prefill")
    settings: dict[str, Any] = {"cache": MINIKV16, "max_new_tokens": 21}
    for seed, length in enumerate((33, 64, 50)):
        mk.generate(model, prompts(length, seed=seed), **settings)
    assert len(traces) == 1


@pytest.mark.parametrize("method", [presets.get("full"), MINIKV16])
def test_continuing_a_cache(model: mk.Llama, method: CacheConfig, monkeypatch: pytest.MonkeyPatch):
    """A cache that `generate` returned holds all it generated; under `full` going on equals one long run."""
    rows = prompts(50, 20)
    first = mk.generate(model, rows, cache=method, max_new_tokens=20, eos_token_ids=())
    assert first.cache.length.tolist() == [70, 40]
    turn = prompts(5, 9, seed=2)
    traces = count_traces(monkeypatch, "extend")
    second = mk.generate(model, turn, cache=first.cache, max_new_tokens=30, eos_token_ids=())
    assert len(traces) == 1
    assert second.cache.length.tolist() == [105, 79]
    if not method.quantized:
        history = [row + new.tolist() + more for row, new, more in zip(rows, first.tokens, turn, strict=True)]
        np.testing.assert_array_equal(second.tokens, tokens(model, history, cache=method, max_new_tokens=30))


def test_stops_at_end_of_sequence(model: mk.Llama):
    (row,) = prompts(30)
    free = tokens(model, [row], cache="full", max_new_tokens=30)[0]
    stop = int(free[11])
    expected = free.tolist().index(stop) + 1
    result = mk.generate(model, [row], cache="full", max_new_tokens=30, eos_token_ids=(stop,))
    assert result.lengths.tolist() == [expected]
    assert result.tokens[0, :expected].tolist() == free[:expected].tolist()
    assert not np.any(result.tokens[0, expected:])
    assert result.cache.length.tolist() == [30 + expected]


def test_sampling_is_seeded_and_obeys_its_limits(model: mk.Llama):
    (row,) = prompts(30)

    def draw(seed: int, **limits: Any) -> list[int]:
        sampling = mk.Sampling(temperature=1.5, **limits)
        return tokens(model, [row], max_new_tokens=32, sampling=sampling, key=jax.random.key(seed))[0].tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    greedy = tokens(model, [row], max_new_tokens=32)[0].tolist()
    assert draw(0) != greedy
    assert draw(0, top_k=1) == greedy
    assert draw(0, top_p=1e-6) == greedy


@pytest.mark.parametrize("name", presets.names())
def test_predicted_bytes_are_allocated(model: mk.Llama, name: str):
    config = dataclasses.replace(presets.get(name), group_size=16)
    result = mk.generate(model, prompts(130, 20), cache=config, max_new_tokens=9)
    report = memory.report(
        model.config, config, prompt_length=bucket_length(130), max_new_tokens=9, batch=2, dtype="float32"
    )
    assert report.bytes == result.cache.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(result.cache))
    assert report.packed_bytes == result.cache.packed_bytes
    assert report.layer_bytes == tuple(layer.nbytes for layer in result.cache.layers)


def test_paper_bytes():
    """MiniKV on LLaMA2-7B, prompt 4096 + 512 new: the paper's 86 % counts packed bytes; with the tail it is 83 %."""
    report = memory.report(
        ModelConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=4608,
        ),
        presets.get("minikv"),
        prompt_length=4096,
        max_new_tokens=512,
    )
    # (2048 kept + 512 new) tokens x 262,144 values x 4 bits (2 and the 16-bit scale and zero of 16 values).
    assert report.packed_bytes == 2560 * 262144 * 4 // 8
    assert report.full_bytes == 4608 * 262144 * 2
    assert report.packed_saved >= 0.86
    assert 0.83 <= report.saved < 0.84


def test_grouped_queries_store_kv_heads(model: mk.Llama):
    report = memory.report(model.config, presets.get("full"), prompt_length=64, max_new_tokens=64)
    heads = model.config.num_key_value_heads
    assert heads < model.config.num_attention_heads
    assert report.tail_bytes == 2 * model.config.num_hidden_layers * 128 * heads * model.config.head_dim * 2


SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8448,
    tie_word_embeddings=True,
)


def compiled_program(config: CacheConfig, tokens: int, batch: int = 1) -> Any:
    """Generate on SmolLM2's shape: its layers are alike, so three stand for thirty."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: mk.Llama(SMOLLM2, rngs=nnx.Rngs(0))))
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    settings = _Settings(128, mk.Sampling(), (), None, False)
    return _generate.lower(graphdef, settings, config, params, ids, lengths, key).compile()


@pytest.mark.parametrize(("name", "batch"), [("minikv", 1), ("full", 1), ("full", 2)])
def test_memory_of_a_long_prompt(name: str, batch: int):
    """At 8192 tokens: no S x S buffer, and the decode loop updates one cache in place."""
    size, config = 8192, presets.get(name)
    program = compiled_program(config, size, batch)
    shapes = re.findall(r"= (\w+)\[([\d,]+)\]", program.as_text())
    assert max(np.prod([int(n) for n in dims.split(",")]) for _, dims in shapes) < size * size
    cache = jax.eval_shape(
        lambda: inference.prefill(
            mk.Llama(SMOLLM2, rngs=nnx.Rngs(0)),
            jnp.zeros((batch, size), jnp.int32),
            jnp.full((batch,), size, jnp.int32),
            config,
            128,
        )[1]
    )
    # Whatever is allocated beside arguments and result is the prompt's activations: linear in the prompt.
    half = compiled_program(config, size // 2, batch).memory_analysis().temp_size_in_bytes
    assert program.memory_analysis().temp_size_in_bytes < 2.2 * half
    big = {leaf.shape for leaf in jax.tree.leaves(cache) if leaf.ndim == 4 and leaf.shape[2] > 128}
    assert big
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not big & {tuple(map(int, dims.split(","))) for dims in copied}


@pytest.mark.parametrize("name", ["minikv", "full"])
def test_a_decode_step_works_in_the_cache_itself(name: str):
    """What decoding allocates does not grow with the cache, which goes in and comes out in the same buffers."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: mk.Llama(SMOLLM2, rngs=nnx.Rngs(0))))
    settings = _Settings(128, mk.Sampling(), (), None, False)

    def program(size: int) -> tuple[Any, int]:
        ids, lengths = jnp.zeros((2, size), jnp.int32), jnp.zeros((2,), jnp.int32)
        prefill = functools.partial(_prefill_only, graphdef, settings, presets.get(name))
        state = jax.eval_shape(lambda params: prefill(params, ids, lengths, jax.random.key(0)), params)
        compiled = _decode_chunk.lower(graphdef, settings, params, state, np.int32(1)).compile()
        return compiled.memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))

    (long, cache), (short, _) = program(8192), program(2048)
    assert long.alias_size_in_bytes >= cache
    assert long.temp_size_in_bytes <= 1.1 * short.temp_size_in_bytes


BASE = CacheConfig(scorer="window", heavy=0.25, recent=0.125, sinks=2, k_bits=2, v_bits=2, residual_length=32)
FIELDS: dict[str, tuple[dict[str, Any], Any]] = {  # field: (what the base has besides, the other value)
    "scorer": ({}, "cumulative"),
    "heavy": ({}, 0.125),
    "recent": ({}, 0.25),
    "sinks": ({}, 0),
    "evict_every": ({"scorer": "cumulative", "k_bits": None, "v_bits": None}, 8),
    "budget": ({}, "pyramid"),
    "pyramid_beta": ({"budget": "pyramid"}, 20.0),
    "variance_cap": ({"budget": "variance"}, 1.0),
    "observation_window": ({}, 8),
    "pooling": ({}, "mean"),
    "pooling_kernel": ({}, 3),
    "quantizer": ({}, "hadamard"),
    "options": ({"scorer": "lagkv"}, {"lag": 16}),
    "k_bits": ({}, 4),
    "v_bits": ({}, 3),
    "group_size": ({"residual_length": 64}, 32),
    "metadata_dtype": ({}, "bfloat16"),
    "residual": ({}, "kivi"),
    "residual_length": ({}, 64),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheConfig)])
def test_every_method_field_is_read(field: str):
    """Changing a field changes the cache that a prompt leaves, in its shapes or in its numbers."""
    if field in ("name", "citation"):  # words about the method, not part of it
        return
    besides, other = FIELDS[field]
    base = dataclasses.replace(BASE, **besides)
    model = tiny_model(head_dim=64, max_position_embeddings=256)
    ids, lengths = jnp.asarray(prompts(200)), jnp.asarray([200])

    def leaves(config: CacheConfig) -> list[np.ndarray]:
        return list(map(np.asarray, jax.tree.leaves(inference.prefill(model, ids, lengths, config, 64)[1])))

    before, after = leaves(base), leaves(dataclasses.replace(base, **{field: other}))
    assert not all(
        a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in itertools.zip_longest(before, after, fillvalue=np.zeros(0))
    )


WRONG = {
    "method": ({"cache": "h3o"}, "'h3o'.*minikv"),
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
    "cache": ({"cache": 5}, "cache is a int: expected a method's name"),
    "sampling": ({"sampling": "greedy"}, "sampling='greedy': expected a minikv_jax.Sampling"),
    "key": ({"sampling": mk.Sampling(temperature=1.0), "key": 5}, "key=5: expected a PRNG key"),
    "no key": ({"sampling": mk.Sampling(temperature=1.0)}, "key=None"),
    "group": ({"cache": presets.get("kivi-2")}, "head_dim 16 is not divisible by group_size 32"),
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
    cache = mk.generate(model, prompts(20), cache="full", max_new_tokens=4).cache
    with pytest.raises(ValueError, match="cache has 1 rows, prompts 2"):
        mk.generate(model, prompts(3, 3), cache=cache)
    with pytest.raises(ValueError, match="layers, KV heads, head dim"):
        mk.generate(tiny_model(num_hidden_layers=3), prompts(3), cache=cache)
    with pytest.raises(ValueError, match="cache has dtype float32, the model bfloat16"):
        mk.generate(tiny_model(dtype="bfloat16"), prompts(3), cache=cache)
    with pytest.raises(ValueError, match=r"24 tokens of the cache \+ 300 prompt tokens \+ 200 new ones exceed"):
        mk.generate(model, prompts(300), cache=cache, max_new_tokens=200)
    mk.generate(model, prompts(3), cache=cache, max_new_tokens=4)
    with pytest.raises(ValueError, match="cache was donated to another call"):
        mk.generate(model, prompts(3), cache=cache, max_new_tokens=4)


def test_a_model_is_asked_for():
    with pytest.raises(ValueError, match="model is a str: expected a Llama"):
        mk.generate("llama", prompts(3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["minikv", "h2o", "minikv-variance"])
def test_numbers_of_64_bits_change_nothing(name: str):
    model = tiny_model(max_position_embeddings=512)
    method = dataclasses.replace(presets.get(name), evict_every=4 if name == "h2o" else None)
    expected = tokens(model, prompts(40, 9), cache=method, max_new_tokens=20)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(tokens(model, prompts(40, 9), cache=method, max_new_tokens=20), expected)


@pytest.mark.parametrize("settings", [{}, {"sampling": mk.Sampling(temperature=1.0), "key": jax.random.key(3)}])
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


def test_stream_compiles_before_it_returns(model: mk.Llama, caplog: pytest.LogCaptureFixture):
    """So that the time of its steps is that of prefill and decoding, for a cache that is gone on with too."""
    cache: Any = "minikv"
    for first in ("_prefill_only", "_extend_only"):
        with jax.log_compiles():
            results = mk.stream(model, prompts(21), cache=cache, max_new_tokens=7, chunk=4)
            assert f"Compiling jit({first})" in caplog.text
            caplog.clear()
            for result in results:
                cache = result.cache
        for name in (first, "_decode_chunk"):
            assert f"Compiling jit({name})" not in caplog.text
        caplog.clear()


def test_log_probabilities_are_the_models(model: mk.Llama):
    (row,) = prompts(40)
    result = mk.generate(model, [row], cache="full", max_new_tokens=12, eos_token_ids=(), log_probabilities=True)
    generated = result.tokens[0].tolist()
    expected = jax.nn.log_softmax(inference.one_shot(model, jnp.asarray([row + generated]))[0, 39:-1])
    assert result.log_probabilities is not None
    found = np.asarray(result.log_probabilities[0])
    np.testing.assert_allclose(found, [line[token] for line, token in zip(expected, generated, strict=True)], atol=2e-5)
    assert mk.generate(model, [row], max_new_tokens=1).log_probabilities is None


def test_prompts_can_be_an_array(model: mk.Llama):
    rows = prompts(30, 30)
    as_array = mk.generate(model, jnp.asarray(rows), max_new_tokens=5).tokens
    np.testing.assert_array_equal(as_array, mk.generate(model, rows, max_new_tokens=5).tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf: expected a finite number"),
        ({"temperature": "1"}, "temperature='1': expected a number"),
        ({"temperature": None}, "temperature=None: expected a number"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k=1.5: expected an integer"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "min_p": 0.0}, "min_p=0.0"),
        ({"top_k": 3}, "temperature > 0"),
    ],
)
def test_wrong_sampling_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        mk.Sampling(**fields)


@pytest.mark.parametrize(
    ("limit", "kept"), [({"top_p": 0.75}, {0, 1}), ({"min_p": 0.25}, {0, 1, 2}), ({"top_k": 1}, {0})]
)
def test_limits_keep_the_likely_tokens(limit: dict[str, Any], kept: set[int]):
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    sampling = mk.Sampling(temperature=1.0, **limit)
    assert {int(sample(logits, sampling, jax.random.key(seed))[0]) for seed in range(100)} == kept


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-38, 1e-45])
def test_a_small_temperature_is_greedy(temperature: float):
    logits = jnp.asarray([[3.0, 88.0, 87.5, -20.0]])
    assert int(sample(logits, mk.Sampling(temperature=temperature), jax.random.key(0))[0]) == 1


def test_variance_budgets_follow_the_spread(model: mk.Llama):
    """Under "variance" rows and layers keep different counts, never more than the capacity."""
    config = dataclasses.replace(presets.get("minikv-variance"), residual_length=32)
    result = mk.generate(model, prompts(200, 90), cache=config, max_new_tokens=1)
    kept = np.asarray(result.cache.kept_tokens) - 1
    mean = np.array([2 * (200 // 4), 2 * (90 // 4)])
    assert np.all(np.abs(kept.mean(axis=0) - mean) <= 1)  # counts are rounded down
    assert np.all(kept >= mean // 2)


def test_last_valid():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(last_valid(hidden, jnp.asarray([1, 4])), [[0, 1, 2], [21, 22, 23]])
