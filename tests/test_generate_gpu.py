"""Tests generation on the GPU: thousands of steps, and a real model against the CPU and "xla"."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from oracle import layout
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax import layerwise
from minikv_jax.cache.capacity import capacities, layer_capacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.models import hub
from minikv_jax.ops.append import append
from minikv_jax.ops.compress import compress
from minikv_jax.ops.select import Kept

STEPS = 10_000
MINIKV = lookup.get("minikv")
GREEDY, PROMPT, FORCED = 64, 2048, 512
ROOT = pathlib.Path(__file__).parents[1]
LOG = ROOT / "examples" / "log.txt"
FILES = [
    *sorted((ROOT / "examples").glob("*.[pt]*")),  # except notebooks, which hold pictures
    ROOT / "LICENSE",
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]

pytestmark = pytest.mark.gpu


def test_ten_thousand_steps_in_flat_memory() -> None:
    """Every token counts, all numbers are finite, and memory does not grow after the first chunk of steps."""
    model = tiny_model(dtype="bfloat16", head_dim=64, hidden_size=128, max_position_embeddings=STEPS + 256)
    prompts = [np.random.default_rng(0).integers(0, 96, size).tolist() for size in (100, 37)]
    held, results = [], []
    settings: Any = {"max_new_tokens": STEPS, "eos_token_ids": (), "log_probabilities": True, "implementation": "cuda"}
    for result in mk.stream(model, prompts, chunk=STEPS // 4, **settings):
        jax.block_until_ready(result)
        stats = jax.local_devices()[0].memory_stats() or {}
        held.append((stats["bytes_in_use"], stats["peak_bytes_in_use"]))
        results = [result]
    assert len(held) == 5
    assert held[2:] == [held[1]] * 3
    (last,) = results
    assert last.lengths.tolist() == [STEPS] * 2
    kept = np.asarray(last.cache.kept_tokens)
    assert (kept == [2 * (100 // 4) + STEPS, 2 * (37 // 4) + STEPS]).all()
    assert np.isfinite(np.asarray(last.log_probabilities)).all()


@pytest.mark.parametrize(
    ("quantizer", "steps"),
    [(MinMax(), STEPS), (MinMax(k_bits=3, metadata_dtype="float8_e4m3fn"), STEPS // 10)],
    ids=["2 bits", "3 bits beside 2"],
)
def test_appends_leave_the_bits_of_the_definition(quantizer: MinMax, steps: int) -> None:
    """Three rows at different paces, with many flushes in each, have the lengths and tails of "xla".

    Codes are not compared, because XLA's division on a GPU is not correctly rounded and may change a code by one.
    """
    rows, kv_heads, head_dim, tokens, table = 3, 2, 64, 256, 997
    keys = jax.random.split(jax.random.key(0), 3)
    new = jax.random.normal(keys[0], (2, table, rows, 1, kv_heads, head_dim), jnp.bfloat16)
    method = dataclasses.replace(MINIKV, quantizer=quantizer)
    capacity = layer_capacity(method, method.heavy, tokens, steps)
    lengths = jnp.full((rows,), capacity.kept, jnp.int32)
    kept = Kept(jnp.broadcast_to(jnp.arange(capacity.kept), (rows, kv_heads, capacity.kept)), lengths)
    prompt = [jax.random.normal(key, (rows, tokens, kv_heads, head_dim), jnp.bfloat16) for key in keys[1:]]

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation: str) -> LayerCache:
        layer = compress(prompt[0], prompt[1], kept, capacity, LayerSpec(method), implementation=implementation)

        def step(i: jax.Array, layer: LayerCache) -> LayerCache:
            active = (i % (1 + jnp.arange(rows)) == 0).astype(jnp.int32)
            k, v = new[:, i % table]
            return append(layer, k, v, active, jnp.zeros((rows, 1), jnp.int32), implementation)

        return lax.fori_loop(0, steps, step, layer)

    ours, theirs = (jax.tree.map(np.asarray, run(name)) for name in ("cuda", "xla"))
    np.testing.assert_array_equal(ours.packed.length, theirs.packed.length)
    np.testing.assert_array_equal(ours.tail.length, theirs.tail.length)
    for row, side in itertools.product(range(rows), ("k", "v")):
        taken = np.arange(0, steps, 1 + row) % table
        which = ("k", "v").index(side)
        old, fresh = np.asarray(prompt[which])[row, : capacity.kept], np.asarray(new)[which, taken, row, 0]
        seen = np.concatenate([old, fresh]).swapaxes(0, 1)  # [K, S, H], all tokens of the row
        packed, tail = int(ours.packed.length[row]), int(ours.tail.length[row])
        assert packed + tail == seen.shape[1]
        packing = quantizer.packing("keys" if side == "k" else "values")
        expected = layout.quantize(
            seen[:, :packed], packing.bits, 16, packing.axis, packing.metadata_dtype, packing.block
        )
        for got, want in zip(jax.tree.leaves(getattr(ours.packed, side)), expected.arrays, strict=True):
            np.testing.assert_array_equal(got[row, :, : want.shape[1]], want)
        for layer in (ours, theirs):
            np.testing.assert_array_equal(getattr(layer.tail, side)[row, :, :tail], seen[:, packed:])


@pytest.fixture(scope="module")
def ids() -> list[int]:
    tokenizer = hub.load(hub.DEMO_MODEL)[1]
    assert tokenizer is not None
    return tokenizer.encode(LOG.read_text())


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    """SmolLM2 in bfloat16, which the kernels read."""
    return hub.load(hub.DEMO_MODEL, dtype="bfloat16")[0]


def test_smollm2_draws_on_the_gpu_what_it_draws_on_the_cpu(ids: list[int]) -> None:
    """64 greedy tokens under `full` in float32 agree, with the GPU's default implementation."""
    model = hub.load(hub.DEMO_MODEL, dtype="float32")[0]
    on_gpu = mk.generate(model, [ids[:512]], method="full", max_new_tokens=64, eos_token_ids=()).tokens
    graphdef, params = nnx.split(model)
    cpu_model = nnx.merge(graphdef, jax.device_put(params, jax.devices("cpu")[0]))
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = mk.generate(
            cpu_model, [ids[:512]], method="full", max_new_tokens=64, eos_token_ids=(), implementation="xla"
        ).tokens
    assert on_gpu.tolist() == on_cpu.tolist()


def each_step(
    model: mk.Llama,
    prompts: Sequence[Sequence[int]],
    steps: int,
    implementation: str,
    forced: np.ndarray | None = None,
) -> Iterator[jax.Array]:
    """Yields logits `[B, V]` of every step under `minikv`, with the likeliest tokens or those of `forced [B, n]`.

    It runs layer by layer, because thirty layers of "xla" in one program take minutes to compile.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    sizes = capacities(model.config, MINIKV, ids.shape[1], steps)
    hidden, layers = layerwise.prefill_layers(model, ids, lengths, True, implementation)
    cache = layerwise.compress_layers(model.config, MINIKV, layers, lengths, lengths, sizes, implementation).cache
    del layers
    for step in range(steps):
        yield (logits := model.logits(hidden))
        token = logits.argmax(-1) if forced is None else jnp.asarray(forced[:, step])
        hidden, cache = layerwise.decode_step(model, cache, token, jnp.ones_like(lengths), implementation)


@pytest.fixture(scope="module")
def prompts(ids: list[int]) -> list[list[int]]:
    """Three excerpts of a log file, of different lengths."""
    return [ids[:900], ids[300:911], ids[700:1450]]


@pytest.fixture(scope="module")
def xla(model: mk.Llama, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[B, 64, V]` along the greedy tokens of "xla", in bfloat16 and in float32."""
    by_xla = np.stack(list(each_step(model, prompts, GREEDY, "xla")), axis=1)
    exact = hub.load(hub.DEMO_MODEL, dtype="float32")[0]
    return by_xla, np.stack(list(each_step(exact, prompts, GREEDY, "xla", by_xla.argmax(-1))), axis=1)


@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_greedy_tokens_are_xlas(
    name: str, model: mk.Llama, prompts: list[list[int]], xla: tuple[np.ndarray, np.ndarray]
) -> None:
    """The first different token is a tie: XLA's two logits differ by less than bfloat16's error."""
    by_xla, in_float32 = xla
    ours = np.stack(list(each_step(model, prompts, GREEDY, name)), axis=1)
    for row, (want, got) in enumerate(zip(by_xla.argmax(-1), ours.argmax(-1), strict=True)):
        unlike = np.flatnonzero(want != got)
        if not unlike.size:
            print(f"{name}, prompt {row}: {GREEDY} tokens alike")
            continue
        first = unlike[0]
        pair = [int(want[first]), int(got[first])]
        logits, exact, by_kernels = (run[row, first, pair] for run in (by_xla, in_float32, ours))
        text = f"prompt {row}, token {first}: {pair} have logits {logits}, in float32 {exact}, by {name} {by_kernels}"
        print(text)
        assert logits[0] - logits[1] <= 2 * abs(logits - exact).max(), text


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """64 windows of 2048 tokens and the next 512 (four tails), from the log and from all over `FILES`.

    A 2-bit cache amplifies bfloat16's rounding: on a single text, two block sizes of "xla" itself may differ by more
    than 0.01.
    """
    tokenizer = hub.load(hub.DEMO_MODEL)[1]
    assert tokenizer is not None
    texts = [tokenizer.encode(file.read_text()) for file in FILES]
    everything = list(itertools.chain(*texts))
    starts = np.linspace(0, len(everything) - PROMPT - FORCED, 63).astype(int)
    rows = [texts[FILES.index(LOG)], *(everything[start:] for start in starts)]
    return np.array([row[: PROMPT + FORCED] for row in rows], np.int32)


def log_probabilities(model: mk.Llama, windows: np.ndarray, implementation: str) -> np.ndarray:
    """Mean log-probability of each window's last tokens, fed one by one to the compressed cache."""
    begin = time.perf_counter()
    forced, per_step = windows[:, PROMPT:], []
    for step, logits in enumerate(each_step(model, windows[:, :PROMPT].tolist(), FORCED, implementation, forced)):
        per_step.append(of_tokens(logits, forced[:, step]))
    means = np.asarray(jnp.stack(per_step)).mean(axis=0)
    print(f"{implementation} {means.mean():.4f}, in {time.perf_counter() - begin:.0f} s", flush=True)
    return means


@jax.jit
def of_tokens(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]


@pytest.fixture(scope="module")
def xla_log_probabilities(model: mk.Llama, windows: np.ndarray) -> np.ndarray:
    return log_probabilities(model, windows, "xla")


@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_smollm2_scores_text_alike_with_the_kernels(
    name: str, model: mk.Llama, windows: np.ndarray, xla_log_probabilities: np.ndarray
) -> None:
    """Mean log-probabilities differ by at most 0.01 through prefill, packing, appends and flushes."""
    differences = log_probabilities(model, windows, name) - xla_log_probabilities
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    print(f"{name} - xla: {differences.mean():+.4f}, standard error {error:.4f}; the log's {differences[0]:+.4f}")
    assert abs(differences.mean()) < 0.01
