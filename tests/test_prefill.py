"""Prefill in chunks: the same numbers as at once, and the memory that it bounds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import random_ids, tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax import inference
from minikv_jax.cache.state import KVCache
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models import decoder as model_module

MINIKV16 = dataclasses.replace(presets.get("minikv"), residual_length=32)


def at_a_time(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    for module in (model_module, inference):
        monkeypatch.setattr(module, "CHUNK_TOKENS", tokens)


def prefill(model: mk.Llama, config: CacheConfig, lengths: list[int], tokens: int) -> tuple[jax.Array, KVCache]:
    run = jax.jit(lambda ids, lengths: inference.prefill(model, ids, lengths, config, 40))  # traced anew at every call
    return run(random_ids((len(lengths), tokens)), jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize(
    ("config", "chunk"),
    [(presets.get("full"), 50), (MINIKV16, 50), (MINIKV16, 160), (presets.get("minikv-variance"), 160)],
    ids=["full-50", "minikv-50", "minikv-160", "minikv-variance-160"],
)
def test_chunks_equal_one_run(config: CacheConfig, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Seven ragged rows of 64, two or one at a time; at 50 tokens a chunk an MLP sees 50 and then 14 of them."""
    model = tiny_model(max_position_embeddings=512)
    lengths = [64, 3, 50, 17, 64, 1, 33]
    hidden, cache = prefill(model, config, lengths, 64)
    at_a_time(monkeypatch, chunk)
    hidden_by_chunks, cache_by_chunks = prefill(model, config, lengths, 64)
    # Matmuls of other shapes may sum in another order; both are of size 1.
    np.testing.assert_allclose(hidden_by_chunks, hidden, atol=1e-5)

    def same(by_chunks: jax.Array, at_once: jax.Array) -> None:
        assert by_chunks.shape == at_once.shape
        assert by_chunks.dtype == at_once.dtype
        if at_once.dtype == jnp.float32:
            np.testing.assert_allclose(by_chunks, at_once, atol=1e-5)
        elif at_once.dtype == jnp.float16:
            np.testing.assert_allclose(by_chunks.astype(jnp.float32), at_once.astype(jnp.float32), rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_array_equal(by_chunks, at_once)

    jax.tree.map(same, cache_by_chunks, cache)


def temporary_bytes(layers: int, batch: int, tokens: int, **changes: Any) -> int:
    """Of a compiled prefill under `minikv`, beside its arguments and its cache."""
    sizes = {"head_dim": 64, "hidden_size": 256, "num_key_value_heads": 4, "intermediate_size": 256} | changes
    config = tiny_config(num_hidden_layers=layers, max_position_embeddings=tokens, **sizes)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: mk.Llama(config, rngs=nnx.Rngs(0))))

    def run(params: Any, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        return inference.prefill(nnx.merge(graphdef, params), ids, lengths, MINIKV16, 64)

    shapes = jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory: Any = jax.jit(run).lower(params, *shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_one_layers_keys_and_values_live_at_a_time():
    one_layer = 2 * 4096 * 256 * 4
    assert temporary_bytes(9, 1, 4096) - temporary_bytes(3, 1, 4096) < one_layer


def test_rows_bound_the_activations(monkeypatch: pytest.MonkeyPatch):
    at_a_time(monkeypatch, 2048)
    assert temporary_bytes(1, 16, 512) < 1.2 * temporary_bytes(1, 4, 512)


def test_chunks_bound_the_mlp(monkeypatch: pytest.MonkeyPatch):
    wide = 2048 * 8192 * 4  # an activation of the MLP
    whole = temporary_bytes(1, 1, 2048, intermediate_size=8192)
    at_a_time(monkeypatch, 256)
    assert temporary_bytes(1, 1, 2048, intermediate_size=8192) < whole - wide
