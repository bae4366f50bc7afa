"""Whole generations on the GPU: thousands of steps, and a real model against the CPU and against "xla"."""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_ffi_reference import quantize
from flax import nnx
from jax import lax
from tiny import tiny_model

import minikv_jax as mk
from minikv_jax import hub, memory, presets
from minikv_jax.cache import LayerCache, append, compress, layer_capacity
from minikv_jax.evaluation import layerwise
from minikv_jax.selection import Kept

STEPS = 10_000
MINIKV = presets.get("minikv")
TEXT = pathlib.Path(__file__).parents[1] / "examples" / "log.txt"

pytestmark = pytest.mark.gpu


def test_ten_thousand_steps_in_flat_memory() -> None:
    """Every token is counted, every number finite, and from the first chunk of steps on no byte is added."""
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


def test_ten_thousand_appends_leave_the_bits_of_the_definition() -> None:
    """Three rows at their own pace: the first's tail rolls over 78 times. Lengths and tails are those of "xla".

    Its codes are not asked for: XLA's division on a GPU is not rounded correctly, so a code may come out one off.
    """
    rows, kv_heads, head_dim, tokens, table = 3, 2, 64, 256, 997
    keys = jax.random.split(jax.random.key(0), 3)
    new = jax.random.normal(keys[0], (2, table, rows, 1, kv_heads, head_dim), jnp.bfloat16)
    capacity = layer_capacity(MINIKV, MINIKV.heavy, tokens, STEPS)
    lengths = jnp.full((rows,), capacity.kept, jnp.int32)
    kept = Kept(jnp.broadcast_to(jnp.arange(capacity.kept), (rows, kv_heads, capacity.kept)), lengths)
    prompt = [jax.random.normal(key, (rows, tokens, kv_heads, head_dim), jnp.bfloat16) for key in keys[1:]]

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation: str) -> LayerCache:
        layer = compress(prompt[0], prompt[1], kept, MINIKV, capacity, implementation=implementation)

        def step(i: jax.Array, layer: LayerCache) -> LayerCache:
            active = (i % (1 + jnp.arange(rows)) == 0).astype(jnp.int32)
            k, v = new[:, i % table]
            return append(layer, k, v, active, jnp.zeros((rows, 1), jnp.int32), implementation)

        return lax.fori_loop(0, STEPS, step, layer)

    ours, theirs = (jax.tree.map(np.asarray, run(name)) for name in ("cuda", "xla"))
    np.testing.assert_array_equal(ours.packed_length, theirs.packed_length)
    np.testing.assert_array_equal(ours.tail_length, theirs.tail_length)
    for row, side in itertools.product(range(rows), ("k", "v")):
        steps = np.arange(0, STEPS, 1 + row) % table
        which = ("k", "v").index(side)
        old, fresh = np.asarray(prompt[which])[row, : capacity.kept], np.asarray(new)[which, steps, row, 0]
        seen = np.concatenate([old, fresh]).swapaxes(0, 1)  # [K, S, H], all that the row has taken
        packed, tail = int(ours.packed_length[row]), int(ours.tail_length[row])
        assert packed + tail == seen.shape[1]
        expected = quantize(seen[:, :packed], 2, 16, {"k": "tokens", "v": "channels"}[side], "float16")
        for got, want in zip(jax.tree.leaves(getattr(ours, side)), expected.arrays, strict=True):
            np.testing.assert_array_equal(got[row, :, : want.shape[1]], want)
        for layer in (ours, theirs):
            np.testing.assert_array_equal(getattr(layer, f"tail_{side}")[row, :, :tail], seen[:, packed:])


@pytest.fixture(scope="module")
def ids() -> list[int]:
    tokenizer = hub.load(hub.DEMO_MODEL)[1]
    assert tokenizer is not None
    return tokenizer.encode(TEXT.read_text())


def test_smollm2_draws_on_the_gpu_what_it_draws_on_the_cpu(ids: list[int]) -> None:
    """64 greedy tokens under `full` in float32, the GPU's by whatever runs there by default."""
    model = hub.load(hub.DEMO_MODEL, dtype="float32")[0]
    on_gpu = mk.generate(model, [ids[:512]], cache="full", max_new_tokens=64, eos_token_ids=()).tokens
    graphdef, params = nnx.split(model)
    cpu_model = nnx.merge(graphdef, jax.device_put(params, jax.devices("cpu")[0]))
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = mk.generate(
            cpu_model, [ids[:512]], cache="full", max_new_tokens=64, eos_token_ids=(), implementation="xla"
        ).tokens
    assert on_gpu.tolist() == on_cpu.tolist()


def mean_log_probability(model: mk.Llama, ids: list[int], prompt: int, implementation: str) -> float:
    """Of the tokens after the first `prompt`, fed one by one to the compressed cache.

    Layer by layer: as one program, thirty layers of "xla" take minutes to compile.
    """
    lengths, active, found = jnp.array([prompt]), jnp.ones(1, jnp.int32), []
    capacities = memory.capacities(model.config, MINIKV, prompt, len(ids) - prompt)
    hidden, layers = layerwise.prefill_layers(model, jnp.array([ids[:prompt]]), lengths, True, implementation)
    cache, _ = layerwise.compress_layers(model.config, MINIKV, layers, lengths, capacities, implementation)
    for token in ids[prompt:]:
        found.append(jax.nn.log_softmax(model.logits(hidden))[0, token])
        hidden, cache = layerwise.decode_step(model, cache, jnp.array([token]), active, implementation)
    return float(jnp.stack(found).mean())


@pytest.fixture(scope="module")
def xla_log_probability(ids: list[int]) -> float:
    return mean_log_probability(hub.load(hub.DEMO_MODEL, dtype="bfloat16")[0], ids[:2560], 2048, "xla")


@pytest.mark.parametrize("name", ["cuda", "pallas"])
def test_smollm2_scores_text_alike_with_the_kernels(name: str, ids: list[int], xla_log_probability: float) -> None:
    """`minikv` over 2048 tokens and the 512 after them, four tails long."""
    ours = mean_log_probability(hub.load(hub.DEMO_MODEL, dtype="bfloat16")[0], ids[:2560], 2048, name)
    print(f"mean log-probability: {name} {ours:.4f}, xla {xla_log_probability:.4f}")
    assert abs(ours - xla_log_probability) < 0.01
