"""A model run layer by layer does what it does as one program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax import inference, layerwise
from minikv_jax.cache import memory
from minikv_jax.cache.state import LayerCapacity
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.base import register_quantizer

LENGTHS = np.array([96, 70], np.int32)
ROOM = 8
PLAIN: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 256}
WINDOWED = PLAIN | {
    "model_type": "qwen2",
    "sliding_window": 50,
    "layer_types": ("full_attention", "sliding_attention", "full_attention"),
}


@register_quantizer("coarser-by-layer")
class CoarserByLayer(mk.Quantizer):
    """A float whose last bits are cut off, more of them in later layers."""

    bits = (16,)
    by_layer = True

    def quantize(self, x: jax.Array, operand: mk.Operand) -> jax.Array:
        step = 2.0 ** (operand.layer - 4)
        return jnp.round(x.astype(jnp.float32) / step) * step

    def dequantize(self, stored: jax.Array, operand: mk.Operand) -> jax.Array:
        del operand
        return stored


BY_LAYER = mk.CacheConfig(
    name="by layer", quantizer="coarser-by-layer", k_bits=16, v_bits=16, heavy=0.3, scorer="window", recent=0.2,
    residual_length=32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "model_fields"),
    [
        (dataclasses.replace(presets.get("minikv-variance"), residual_length=32), PLAIN),
        (dataclasses.replace(presets.get("h2o"), evict_every=2), PLAIN),
        (BY_LAYER, WINDOWED),
    ],
    ids=["variance", "evicting", "by-layer-windowed"],
)
def test_layer_by_layer_is_the_whole_model(config: mk.CacheConfig, model_fields: dict[str, Any]):
    """Prompt, cache, which tokens, and decode steps of which one row skips some."""
    model = tiny_model(**model_fields)
    ids = np.random.default_rng(0).integers(0, 96, (2, 96)).astype(np.int32)
    whole = jax.jit(functools.partial(inference.prefill, config=config, max_new_tokens=ROOM))
    step = jax.jit(inference.decode)
    wanted, wanted_cache = whole(model, ids, LENGTHS)
    hidden, layers = layerwise.prefill_layers(model, ids, LENGTHS, True, None)
    capacities = memory.capacities(model.config, config, 96, ROOM)
    cache, kept, _ = layerwise.compress_layers(model.config, config, layers, LENGTHS, capacities, None)
    assert [chosen.tokens.tolist() for chosen in kept] == wanted_cache.kept_tokens.tolist()
    for number in range(ROOM):
        close(hidden, wanted)
        close([lengths_of(layer) for layer in cache.layers], [lengths_of(layer) for layer in wanted_cache.layers])
        assert cache.nbytes == wanted_cache.nbytes
        token, active = jnp.array([number, 5]), jnp.array([1, number % 2])
        hidden, cache = layerwise.decode_step(model, cache, token, active, None)
        wanted, wanted_cache = step(model, wanted_cache, token, active)


def lengths_of(layer: Any) -> tuple[jax.Array, jax.Array]:
    return layer.packed_length, layer.tail_length


def close(got: Any, wanted: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)


def test_layers_share_their_programs():
    """Three layers of different budgets, a program per part, and none for a second batch; the room changes nothing."""
    model, config = tiny_model(**PLAIN), dataclasses.replace(presets.get("minikv-pyramid"), residual_length=32)
    ids, lengths = np.random.default_rng(1).integers(0, 96, (1, 96)).astype(np.int32), LENGTHS[1:]
    own = memory.capacities(model.config, config, 96, ROOM)
    shared = layerwise.shared_capacities(model.config, config, 96, ROOM)
    assert len({*own}) > len({*shared}) == 1
    parts = ("_prefill_layer", "_score_layer", "_compress_layer", "_decode_layer")
    programs = [getattr(layerwise, name) for name in parts]

    def run(capacities: tuple[LayerCapacity, ...]) -> jax.Array:
        hidden, layers = layerwise.prefill_layers(model, ids, lengths, True, None)
        cache = layerwise.compress_layers(model.config, config, layers, lengths, capacities, None).cache
        for _ in range(2):
            hidden, cache = layerwise.decode_step(model, cache, jnp.array([1]), jnp.array([1]), None)
        return hidden

    before = [program._cache_size() for program in programs]
    first, second = run(shared), run(shared)
    assert [program._cache_size() - old for program, old in zip(programs, before, strict=True)] == [1, 1, 1, 1]
    np.testing.assert_array_equal(first, second)
    close(first, run(own))
