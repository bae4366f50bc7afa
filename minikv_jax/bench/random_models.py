"""Models of known shapes with random weights, which is all that speed depends on."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.huggingface import config_from_hf
from minikv_jax.models.partition import shard_model

SHAPES = pathlib.Path(__file__).parent / "shapes"


def shape_config(shape: str) -> ModelConfig:
    """The config of a named shape, of a config.json or of its directory."""
    named = SHAPES / f"{shape}.json"
    if named.is_file():
        return config_from_hf(named)
    if not pathlib.Path(shape).exists():
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise ValueError(f"shape {shape!r}: expected one of {names}, a config.json or a directory that holds one")
    return config_from_hf(shape)


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The config of a model's first layers. Raises ValueError if it has fewer."""
    if not 1 <= count <= config.num_hidden_layers:
        raise ValueError(f"layers={count}: expected 1 to {config.num_hidden_layers}, the model's")
    types, experts = config.layer_types and config.layer_types[:count], config.experts
    if experts is not None:
        experts = dataclasses.replace(experts, dense_layers=tuple(n for n in experts.dense_layers if n < count))
    kept = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
    windows = {name: getattr(config, name) if types is None or kind in types else None for name, kind in kept.items()}
    unrotated = tuple(n for n in config.unrotated_layers if n < count)
    return dataclasses.replace(
        config, num_hidden_layers=count, layer_types=types, experts=experts, unrotated_layers=unrotated, **windows
    )


def skeleton(config: ModelConfig, dtype: str, mesh: Mesh | None = None) -> Llama:
    """The model with shapes in place of its weights."""
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return model if mesh is None else shard_model(model, mesh)


def random_model(config: ModelConfig, dtype: str, mesh: Mesh | None = None) -> Llama:
    """Makes a model with random weights on the device or mesh, one array at a time; norms scale by one."""
    graph, state = nnx.split(skeleton(config, dtype, mesh))
    leaves = nnx.to_flat_state(state)
    filled: dict[Any, Any] = {}
    # The largest first, so that the memory for drawing never decides the peak.
    for number, (path, leaf) in enumerate(sorted(leaves, key=lambda pair: -pair[1].size)):
        key = jax.random.fold_in(jax.random.key(0), number)
        filled[path] = leaf.replace(_random_array(key, leaf.get_value()).block_until_ready())
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _random_array(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values of a shape, drawn where they are to lie; a norm's are ones."""

    def draw(key: jax.Array) -> jax.Array:
        if len(like.shape) == 1:
            return jnp.ones(like.shape, like.dtype)
        return 0.02 * jax.random.normal(key, like.shape, like.dtype)

    return jax.jit(draw, out_shardings=like.sharding)(key)
