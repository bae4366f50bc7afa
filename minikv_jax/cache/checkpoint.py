"""A compressed cache on disk (Orbax), with the method that made it: prefill a long document once, continue it later."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from minikv_jax.cache.state import KVCache, LayerCache
from minikv_jax.methods import quantizers
from minikv_jax.methods.base import Operand
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.config import ModelConfig
from minikv_jax.ops.evict import Eviction

_DESCRIPTION = "cache.json"
_ARRAYS = "arrays"


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> None:
    """Writes `cache` into the new directory `path`.

    Raises:
      FileExistsError: if there is something at `path` already.
    """
    directory = pathlib.Path(path).resolve()
    if directory.exists():
        raise FileExistsError(f"{directory} exists: a cache is saved into a new directory")
    directory.mkdir(parents=True)
    batch, kv_heads, _, head_dim = cache.layers[0].tail_k.shape
    description = {
        "config": dataclasses.asdict(cache.layers[0].config),
        "batch": batch,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": str(cache.layers[0].tail_k.dtype),
        "layers": [
            {"packed": layer.packed_capacity, "tail": layer.tail_capacity, "window": layer.window}
            for layer in cache.layers
        ],
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ARRAYS, _leaves(cache))
    (directory / _DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")


def restore_cache(path: str | os.PathLike[str], model: ModelConfig) -> KVCache:
    """Reads what `save_cache` wrote, for a model of the same shape.

    Raises:
      FileNotFoundError: `path` holds no cache.
      ValueError: the description is damaged, or the cache was made by a model of another shape; the text names what
        differs.
    """
    directory = pathlib.Path(path).resolve()
    if not (directory / _DESCRIPTION).is_file():
        raise FileNotFoundError(f"{directory} holds no saved cache: {_DESCRIPTION} is missing")
    try:
        description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{directory / _DESCRIPTION} is not valid JSON: {error}") from error
    _check_model(description, model)
    abstract = jax.eval_shape(lambda: _blank(description))
    leaves, structure = jax.tree.flatten(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(directory / _ARRAYS, _leaves(abstract))
    return jax.tree.unflatten(structure, [stored[f"{index:05d}"] for index in range(len(leaves))])


def _leaves(cache: KVCache) -> dict[str, Array]:
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(cache))}


def _check_model(description: dict, model: ModelConfig) -> None:
    windows = [layer["window"] for layer in description["layers"]]
    for name, stored, expected in (
        ("layers", len(windows), model.num_hidden_layers),
        ("KV heads", description["kv_heads"], model.num_key_value_heads),
        ("head dim", description["head_dim"], model.head_dim),
        ("sliding windows", windows, [model.window(layer) for layer in range(model.num_hidden_layers)]),
    ):
        if stored != expected:
            raise ValueError(f"the saved cache has {name} {stored}, the model {expected}")


def _blank(description: dict) -> KVCache:
    """A cache of zeros with the described structure, for its shapes."""
    config = CacheConfig(**description["config"])
    batch, kv_heads, dim = (description[name] for name in ("batch", "kv_heads", "head_dim"))
    zero = jnp.zeros((batch,), jnp.int32)

    def layer(number: int, packed: int, tail: int, window: int | None) -> LayerCache:
        k = v = None
        if config.quantized:
            x = jnp.zeros((batch, kv_heads, packed, dim), description["dtype"])
            k = quantizers.quantize(x, Operand("keys", number, config))
            v = quantizers.quantize(x, Operand("values", number, config))
        places = lambda size: None if window is None else jnp.zeros((batch, kv_heads, size), jnp.int32)  # noqa: E731
        full = jnp.zeros((batch, kv_heads, tail, dim), description["dtype"])
        packed_positions = places(packed) if config.quantized else None
        eviction = None
        if config.evict_every is not None:
            scores = jnp.zeros((batch, kv_heads, tail), jnp.float32) if config.heavy else None
            eviction = Eviction(scores, zero, zero)
        return LayerCache(
            k, v, full, full, zero, zero, packed_positions, places(tail), config, window, number, eviction
        )

    return KVCache(tuple(layer(number, **sizes) for number, sizes in enumerate(description["layers"])), zero)
