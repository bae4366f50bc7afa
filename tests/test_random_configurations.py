"""Random configurations of a generation, each by two ways of the library that share little.

`generate` draws tokens in one program. By hand, `prefill`, `decode` and `extend` are called one after the other with
those tokens: its draws, its log-probabilities and its cache must come out again. Rows must not see one another,
whatever their order, and a cache must come back from disk bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax.cache import memory
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Quantizer, Uniform
from minikv_jax.methods.method import Method, Tail, Tokens
from minikv_jax.programs import Programs
from minikv_jax.sampling import sample

ROWS, PROMPT, NEW, TURN = 3, 64, 12, 8  # prompts of at most 64 tokens share a bucket, and so their programs
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "max_position_embeddings": 256}
WINDOWS: dict[str, Any] = {
    "model_type": "qwen2",
    "sliding_window": 40,
    "layer_types": ("full_attention", "sliding_attention"),
}
SAMPLINGS = (
    mk.Sampling(),
    mk.Sampling(temperature=1.0),
    mk.Sampling(temperature=0.7, top_k=5),
    mk.Sampling(temperature=1.3, top_p=0.8),
    mk.Sampling(temperature=1.0, min_p=0.1),
)
COMPOSITIONS = 14


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    """Most of the time here goes into compiling, and what is computed does not depend on how well that is done."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Methods --------------------------------------------------------------------------------------------------------------


def preset(name: str) -> Method:
    """A named method whose counts of tokens are cut down to prompts of 64."""

    def small(amount: Any) -> Any:
        return Tokens(max(amount.count // 32, 3)) if isinstance(amount, Tokens) else amount

    method = lookup.get(name)
    tail = dataclasses.replace(method.tail, length=32)
    return dataclasses.replace(method, heavy=small(method.heavy), recent=small(method.recent), tail=tail)


def composition(seed: int) -> Method:
    """A random method."""
    rng = np.random.default_rng(seed)

    def one(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    def amount() -> float | int:
        return one(int(rng.integers(0, 40)), int(rng.integers(0, 50)) / 100)

    evicts = rng.random() < 0.3
    votes = {"observation_window": one(1, 8, 40), "pooling": one("max", "mean"), "pooling_kernel": one(1, 7, 31)}
    scorers = (
        mk.SnapKV(**votes),
        mk.Twin(**votes, long_window=one(20, 64)),
        mk.KNorm(),
        mk.KeyDiff(),
        mk.LagKV(lag=one(4, 16)),
        mk.ExpectedAttention(future=one(1, 64), epsilon=one(0.0, 0.1)),
    )
    method = Method(
        name=f"composition {seed}",
        scorer=one(mk.H2O(), mk.TOVA()) if evicts else one(*scorers, mk.H2O(), mk.TOVA()),
        heavy=amount(),
        recent=max(amount(), 1),
        sinks=one(0, 1, 4, 9),
        budget=one(lookup.get("full").budget, mk.Pyramid(beta=one(1.0, 7.0)), mk.Variance(cap=one(1.0, 2.0))),
        evict_every=one(1, 5, 16) if evicts else None,
        quantizer=None if evicts else one(None, *quantizers(one)),
        tail=Tail(length=one(32, 64), rule=one("minikv", "kivi")),
        refit=one(None, None, mk.Ridge(queries=one(1, 9), strength=one(0.1, 1.0))),
    )
    drafts = bool(method.heavy) and not method.keeps_all
    return dataclasses.replace(method, lookahead=one(0, 0, 1, 5) if drafts else 0)


def quantizers(one: Any) -> list[Quantizer]:
    """Every quantizer, with random settings."""
    bits = {"k_bits": one(1, 2, 3, 4, 8), "v_bits": one(1, 2, 3, 4, 8)}
    groups = {"group_size": one(16, 32), "metadata_dtype": one("float16", "bfloat16", "float8_e4m3fn")}
    return [
        mk.MinMax(**bits, **groups),
        mk.Hadamard(**bits, **groups),
        mk.HQQ(**bits, **groups, iterations=one(0, 3)),
        mk.RTN(**bits, **groups),
        mk.TurboQuant(k_bits=one(1, 2, 3, 4), v_bits=one(2, 4)),
        mk.NVFP4(),
        mk.FP8(format=one("e4m3", "e5m2")),
    ]


# The two ways ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compiled: a method, a model, and how tokens are drawn."""

    method: Method
    model: mk.Llama
    sampling: mk.Sampling
    eos: tuple[int, ...]


@functools.cache
def setups() -> list[Setup]:
    one, two, windows = tiny_model(**SIZES, num_hidden_layers=1), tiny_model(**SIZES), tiny_model(**SIZES | WINDOWS)
    methods = [*map(preset, lookup.names()), *map(composition, range(COMPOSITIONS))]
    made = []
    for number, method in enumerate(methods):
        # Budgets that differ by layer need two of them; one is compiled twice as fast.
        model = one if isinstance(method.budget, Uniform) else two
        if method.evict_every is None and number % 7 == 1:
            model = windows
        made.append(Setup(method, model, SAMPLINGS[number % len(SAMPLINGS)], (5, 7) if number % 2 else ()))
    return made


PREFILL = jax.jit(mk.prefill, static_argnames=("method", "max_new_tokens"))
SELECT = jax.jit(KVCache.select_rows)
DRAW = jax.jit(sample, static_argnames="sampling")


@jax.jit
def step(model: mk.Llama, cache: KVCache, token: jax.Array, active: jax.Array) -> tuple[jax.Array, KVCache]:
    hidden, cache = mk.decode(model, cache, token, active)
    return model.logits(hidden), cache


@jax.jit
def turn(model: mk.Llama, cache: KVCache, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
    hidden, cache = mk.extend(model, cache, ids, lengths)
    return model.logits(hidden[jnp.arange(ROWS), lengths - 1]), cache


def pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((ROWS, PROMPT), 3, np.int32)  # what lies behind a row's end must not matter: not 0, as elsewhere
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    return ids, np.array([len(row) for row in rows], np.int32)


def generate(setup: Setup, rows: list[list[int]], seed: int, cache: KVCache | None = None) -> mk.GenerateResult:
    how: Any = {"method": setup.method} if cache is None else {"cache": cache}
    return mk.generate(setup.model, rows, **options(setup, seed), **how)


def options(setup: Setup, seed: int) -> dict[str, Any]:
    return {
        "max_new_tokens": NEW,
        "sampling": setup.sampling,
        "key": jax.random.key(seed),
        "eos_token_ids": setup.eos,
        "log_probabilities": True,
    }


def replay(setup: Setup, logits: jax.Array, cache: KVCache, result: mk.GenerateResult, seed: int) -> None:
    """Goes by hand through what `generate` drew, and holds every draw against these logits."""
    key, active = jax.random.key(seed), np.ones(ROWS, bool)
    tokens, log_probabilities = np.asarray(result.tokens), np.asarray(result.log_probabilities)
    for at in range(NEW):
        if not active.any():
            break
        key, draw = jax.random.split(key)
        np.testing.assert_array_equal(tokens[:, at], DRAW(logits, setup.sampling, draw) * active)
        now = np.asarray(jax.nn.log_softmax(logits))[np.arange(ROWS), tokens[:, at]]
        np.testing.assert_allclose(log_probabilities[:, at], now * active, atol=1e-4)
        logits, cache = step(setup.model, cache, tokens[:, at], active.astype(np.int32))
        active &= ~np.isin(tokens[:, at], setup.eos)
    assert_same_shape(cache, result.cache)


def assert_same_shape(one: KVCache, other: KVCache) -> None:
    """The same tokens per row and layer, in caches of the same bytes."""
    np.testing.assert_array_equal(one.length, other.length)
    np.testing.assert_array_equal(one.kept_tokens, other.kept_tokens)
    assert one.nbytes == other.nbytes


# What holds -----------------------------------------------------------------------------------------------------------


def by_hand(setup: Setup, rows: list[list[int]], seed: int) -> tuple[mk.GenerateResult, KVCache]:
    """A generation, and the cache of its prompts, after the generation has been gone through by hand."""
    ids, lengths = pad(rows)
    result = generate(setup, rows, seed)
    hidden, cache = PREFILL(setup.model, ids, lengths, method=setup.method, max_new_tokens=NEW)
    assert cache.nbytes == forecast(setup)
    replay(setup, setup.model.logits(hidden), cache, result, seed)
    return result, cache


@functools.cache
def forecast(setup: Setup) -> int:
    sizes: dict[str, Any] = {"prompt_length": PROMPT, "max_new_tokens": NEW, "batch": ROWS, "dtype": "float32"}
    return memory.report(setup.model.config, setup.method, **sizes).bytes


def rows_are_alone(setup: Setup, rows: list[list[int]], seed: int, result: mk.GenerateResult, other: list[int]) -> None:
    """The first row's tokens do not change with the other rows."""
    again = generate(setup, [rows[0], other, other[:1]], seed)
    length = min(int(result.lengths[0]), int(again.lengths[0]))
    np.testing.assert_array_equal(again.lengths[0], result.lengths[0])
    np.testing.assert_array_equal(again.tokens[0, :length], result.tokens[0, :length])
    one, two = (np.asarray(each.log_probabilities)[0, :length] for each in (again, result))
    np.testing.assert_array_equal(one, two)


def rows_can_be_selected(setup: Setup, cache: KVCache, order: np.ndarray, token: int) -> None:
    """Rows in another order, or several times, decode as they did in the old one."""
    tokens, active = np.full(ROWS, token, np.int32), np.ones(ROWS, np.int32)
    logits, stepped = step(setup.model, cache, tokens, active)
    picked, picked_cache = step(setup.model, SELECT(cache, order), tokens, active)
    np.testing.assert_allclose(picked, np.asarray(logits)[order], atol=1e-4)
    assert_same_shape(picked_cache, SELECT(stepped, order))


def comes_back_from_disk(setup: Setup, cache: KVCache) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "cache"
        mk.save_cache(cache, path)
        restored = mk.restore_cache(path, setup.model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(cache)
    jax.tree.map(np.testing.assert_array_equal, restored, cache)


@functools.cache
def ahead(setup: Setup) -> Programs:
    more = {name: value for name, value in options(setup, 0).items() if name != "key"}
    return mk.compile_ahead(setup.model, ROWS, PROMPT, method=setup.method, **more)


def streams(setup: Setup, rows: list[list[int]], seed: int, result: mk.GenerateResult, chunk: int) -> None:
    """The programs of `stream`, which go on from one chunk of tokens to the next."""
    programs, params = ahead(setup), nnx.state(setup.model)
    state = programs.prefill(params, None, *pad(rows), jax.random.key(seed))
    for last in range(chunk, NEW + chunk, chunk):
        state = programs.decode(params, state, np.int32(min(last, NEW)))
    np.testing.assert_array_equal(state.tokens, result.tokens)
    one, two = (np.asarray(each.log_probabilities) for each in (state, result))
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert_same_shape(state.cache, result.cache)


def goes_on(setup: Setup, cache: KVCache, rows: list[list[int]], seed: int) -> None:
    """A second turn, from a cache that `generate` grows as it needs."""
    ids, lengths = pad(rows)
    result = generate(setup, rows, seed, jax.tree.map(jnp.copy, cache))
    grown = cache.grow(grown_by(cache, result.cache))
    logits, grown = turn(setup.model, grown, ids, lengths)
    replay(setup, logits, grown, result, seed)


def grown_by(old: KVCache, new: KVCache) -> int:
    layer, grown = old.parts[0], new.parts[0]
    return grown.packed.capacity - layer.packed.capacity + grown.tail.capacity - layer.tail.capacity


def run(data: strategies.DataObject, numbers: list[int]) -> None:
    number = data.draw(strategies.sampled_from(numbers), "setup")
    setup = setups()[number]
    seed = data.draw(strategies.integers(0, 2**32 - 1), "seed")
    lengths = data.draw(strategies.lists(strategies.integers(1, PROMPT), min_size=ROWS, max_size=ROWS), "lengths")
    rng = np.random.default_rng(seed)
    vocabulary = setup.model.config.vocab_size
    rows = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    result, cache = by_hand(setup, rows, seed)
    if data.draw(strategies.booleans(), "other rows"):
        rows_are_alone(setup, rows, seed, result, rng.integers(0, vocabulary, PROMPT).tolist())
    if data.draw(strategies.booleans(), "select"):
        rows_can_be_selected(setup, cache, rng.integers(0, ROWS, ROWS), int(rng.integers(0, vocabulary)))
    if data.draw(strategies.integers(0, 19), "save") == 7:
        comes_back_from_disk(setup, result.cache)
    # Programs of their own, and so for some setups only.
    if number % 6 == 0:
        streams(setup, rows, seed, result, chunk=data.draw(strategies.integers(1, NEW), "chunk"))
    if number % 6 == 3:
        goes_on(setup, result.cache, [row[:TURN] for row in rows], seed)


how = functools.partial(
    hypothesis.settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    phases=(hypothesis.Phase.generate,),  # a failure is reported as it was found: to shrink it is to compile
)


@how(max_examples=20)
@hypothesis.given(data=strategies.data())
def test_a_few_configurations(data: strategies.DataObject):
    run(data, [lookup.names().index("minikv-snap"), len(lookup.names()) + 3])


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(4))  # for as many processes
def test_many_configurations(part: int):
    count = []

    @how(max_examples=125)
    @hypothesis.given(data=strategies.data())
    def go(data: strategies.DataObject) -> None:
        run(data, list(range(part, len(setups()), 4)))
        count.append(1)

    go()
    print(f"{len(count)} configurations of {len(range(part, len(setups()), 4))} methods")
    assert len(count) >= 125
