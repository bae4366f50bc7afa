"""Splits a model over the devices of a mesh by whole heads, MLP columns and vocabulary entries.

As in Megatron-LM (arXiv 1909.08053), the first projections of attention and MLP are split by columns and the last ones
by rows. Devices then communicate only to sum the results of attention and MLP.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minikv_jax import meshes
from minikv_jax.meshes import MODEL
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.projections import JOINED, mlp_columns

_VOCABULARY = {"embed_tokens.embedding": P(MODEL, None), "lm_head.kernel": P(None, MODEL)}
_LAYERS = {
    re.compile(r".*\.experts\.gate_up_proj\.kernel"): P(None, None, MODEL),
    re.compile(r".*\.experts\.gate_up_proj\.bias"): P(None, MODEL),
    re.compile(r".*\.experts\.down_proj\.kernel"): P(None, MODEL, None),
    re.compile(rf".*\.({'|'.join((*JOINED, 'up_proj'))})\.kernel"): P(None, MODEL),
    re.compile(rf".*\.({'|'.join((*JOINED, 'up_proj'))})\.bias"): P(MODEL),
    re.compile(r".*\.(q_b_proj|kv_b_proj)\.kernel"): P(None, MODEL),
    re.compile(r".*\.(o_proj|down_proj)\.kernel"): P(MODEL, None),
}


def check_mesh(config: ModelConfig, mesh: Mesh) -> Mesh:
    """Returns the mesh with the axes that this library uses (`meshes.automatic`).

    Raises:
      ValueError: the axis "model" does not divide the model.
    """
    mesh = meshes.automatic(mesh)
    device_part(config, mesh.shape[MODEL])
    return mesh


def device_part(config: ModelConfig, shards: int) -> ModelConfig:
    """Returns the config of one device's part of a model that is split over `shards` devices along "model".

    Raises:
      ValueError: `shards` does not divide the model.
    """
    units = {
        "num_key_value_heads": config.num_key_value_heads,
        "num_attention_heads": config.num_key_value_heads,
        "intermediate_size": mlp_columns(config, config.intermediate_size).groups,
    }
    for name, count in units.items():
        _check_split(name, getattr(config, name), count, shards)
    sizes: dict[str, Any] = {name: getattr(config, name) // shards for name in units}
    if config.experts is not None:
        own = {name: getattr(config.experts, name) for name in ("intermediate_size", "shared_size")}
        for name, size in own.items():
            _check_split(f"experts.{name}", size, mlp_columns(config, size).groups, shards)
        sizes["experts"] = dataclasses.replace(config.experts, **{name: size // shards for name, size in own.items()})
    sizes["vocab_size"] = config.vocab_size // vocabulary_parts(config, shards)
    return dataclasses.replace(config, **sizes, eos_token_ids=())


def _check_split(name: str, size: int, units: int, shards: int) -> None:
    if units % shards:
        raise ValueError(
            f"mesh axis model={shards}: {name}={size} cannot be split into {shards} equal parts "
            "of whole KV heads; use a divisor of the KV heads, and the axis data for the other devices"
        )


def vocabulary_parts(config: ModelConfig, shards: int) -> int:
    """Number of parts of the vocabulary: `shards`, or 1 if they do not divide it."""
    return 1 if config.vocab_size % shards else shards


def spec(path: str, config: ModelConfig, shards: int) -> P:
    """Returns the partition of the parameter at a dotted path over `shards` devices along "model"."""
    if path in _VOCABULARY:
        # An embedding that only looks tokens up is whole on every device, so that a lookup needs no communication.
        looks_up_only = path == "embed_tokens.embedding" and not config.tie_word_embeddings
        return P() if looks_up_only or vocabulary_parts(config, shards) == 1 else _VOCABULARY[path]
    return next((split for pattern, split in _LAYERS.items() if pattern.fullmatch(path)), P())


def placement(path: str, config: ModelConfig, mesh: Mesh | None) -> jax.sharding.Sharding:
    """Returns the sharding of the parameter at a dotted path: on the mesh, or on JAX's default device."""
    if mesh is None:
        return meshes.default_device()
    return NamedSharding(mesh, spec(path, config, mesh.shape[MODEL]))


def shard_model(model: Llama, mesh: Mesh) -> Llama:
    """Splits a model's parameters over the devices of a mesh; `generate` then runs on that mesh.

    Heads, MLP columns and the vocabulary are divided along the axis "model", as in Megatron-LM (arXiv 1909.08053).

    Args:
      model: a model with arrays, or with `jax.ShapeDtypeStruct`s as parameters.
      mesh: devices with an axis "data" (rows of a batch), an axis "model" or both (`make_mesh`).

    Returns:
      A model of the same config and dtype with its parameters on the mesh. The given model is unchanged.

    Raises:
      ValueError: the axis "model" does not divide the KV heads or the MLP, or the mesh has other axes or devices of
        several platforms.
    """
    mesh = check_mesh(model.config, mesh)
    graph, state = nnx.split(model)

    def put(path: tuple, leaf: Any) -> Any:
        where = placement(".".join(map(str, path)), model.config, mesh)
        value = leaf.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where))
        return leaf.replace(jax.device_put(value, where))

    flat: dict[Any, Any] = {path: put(path, leaf) for path, leaf in nnx.to_flat_state(state)}
    placed = nnx.merge(graph, nnx.from_flat_state(flat))
    placed.mesh = mesh
    return placed
