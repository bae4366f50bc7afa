"""Tests that a model run layer by layer equals the model in one program."""

import collections
import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

from minikv_jax import layerwise
from minikv_jax.cache.capacity import LayerCapacity, capacities
from minikv_jax.cache.state import LayerCache
from minikv_jax.decode import decode
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Operand, Quantizer
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.models.design import Latent
from minikv_jax.prefill import prefill

LENGTHS = np.array([96, 70], np.int32)
ROOM = 8
PLAIN: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 256}
LATENT = PLAIN | {"num_key_value_heads": 4, "latent": Latent(query_rank=0, kv_rank=8, value_dim=8)}
WINDOWED = PLAIN | {
    "model_type": "qwen2",
    "sliding_window": 50,
    "layer_types": ("full_attention", "sliding_attention", "full_attention"),
}


class CoarserByLayer(Quantizer):
    """Quantizer that cuts off the last bits of floats, more of them in later layers."""

    choices: ClassVar[tuple[int, ...]] = (16,)
    by_layer: ClassVar[bool] = True

    k_bits: int = 16
    v_bits: int = 16

    def encode(self, x: jax.Array, operand: Operand) -> jax.Array:
        assert operand.layer is not None
        step = 2.0 ** (operand.layer - 4)
        return jnp.round(x.astype(jnp.float32) / step) * step

    def decode(self, stored: jax.Array, operand: Operand) -> jax.Array:
        del operand
        return stored


BY_LAYER = Method(scorer=SnapKV(), heavy=0.3, recent=0.2, quantizer=CoarserByLayer(), tail=Tail(length=32))


@pytest.mark.parametrize(
    ("method", "model_fields"),
    [
        (dataclasses.replace(lookup.get("minikv-variance"), tail=Tail(length=32)), PLAIN),
        (dataclasses.replace(lookup.get("h2o"), evict_every=2), PLAIN),
        (BY_LAYER, WINDOWED),
        (dataclasses.replace(lookup.get("criticalkv"), heavy=20, recent=6), LATENT),
    ],
    ids=["variance", "evicting", "by-layer-windowed", "two stages, latent attention"],
)
def test_layer_by_layer_is_the_whole_model(method: Method, model_fields: dict[str, Any]):
    """Hidden states, caches, kept tokens and decode steps agree, even if a row skips steps."""
    model = tiny_model(**model_fields)
    ids = np.random.default_rng(0).integers(0, 96, (2, 96)).astype(np.int32)
    whole = jax.jit(functools.partial(prefill, method=method, max_new_tokens=ROOM))
    step = jax.jit(decode)
    expected, expected_cache = whole(model, ids, LENGTHS)
    hidden, layers = layerwise.prefill_layers(model, ids, LENGTHS, True, None)
    sizes = capacities(model.config, method, 96, ROOM)
    cache, kept, _ = layerwise.compress_layers(model.config, method, layers, LENGTHS, LENGTHS, sizes, None)
    assert [chosen.tokens.tolist() for (chosen,) in kept] == expected_cache.kept_tokens.tolist()
    for number in range(ROOM):
        close(hidden, expected)
        close([lengths_of(layer) for layer in cache.parts], [lengths_of(layer) for layer in expected_cache.parts])
        assert cache.nbytes == expected_cache.nbytes
        token, active = jnp.array([number, 5]), jnp.array([1, number % 2])
        hidden, cache = layerwise.decode_step(model, cache, token, active, None)
        expected, expected_cache = step(model, expected_cache, token, active)


def lengths_of(layer: LayerCache) -> tuple[jax.Array, jax.Array]:
    return layer.packed.length, layer.tail.length


def close(got: Any, expected: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_layers_share_their_programs(caplog: pytest.LogCaptureFixture):
    """Three layers with different budgets share one program per part; a second batch or other room adds none."""
    model = tiny_model(**PLAIN)
    method = dataclasses.replace(lookup.get("minikv-pyramid"), tail=Tail(length=32))
    ids, lengths = np.random.default_rng(1).integers(0, 96, (1, 96)).astype(np.int32), LENGTHS[1:]
    own = capacities(model.config, method, 96, ROOM)
    shared = layerwise.shared_capacities(model.config, method, 96, ROOM)
    assert len({*own}) > len({*shared}) == 1

    def run(sizes: tuple[LayerCapacity, ...]) -> jax.Array:
        hidden, layers = layerwise.prefill_layers(model, ids, lengths, True, None)
        cache = layerwise.compress_layers(model.config, method, layers, lengths, lengths, sizes, None).cache
        for _ in range(2):
            hidden, cache = layerwise.decode_step(model, cache, jnp.array([1]), jnp.array([1]), None)
        return hidden

    with jax.log_compiles():
        first = run(shared)
        programs = collections.Counter(re.findall(r"Compiling jit\((\w+_layer)\)", caplog.text))
        assert list(programs.values()) == [1, 1, 1, 1]  # attention, scores, cache, decode step
        caplog.clear()
        second = run(shared)
        assert "Compiling" not in caplog.text
    np.testing.assert_array_equal(first, second)
    close(first, run(own))
