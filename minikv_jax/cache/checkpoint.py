"""A compressed cache on disk (Orbax), with the method that made it: prefill a long document once, continue it later."""

from __future__ import annotations

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from minikv_jax.cache.state import Eviction, KVCache, LayerCache, LayerSpec, Region, empty_region
from minikv_jax.methods.base import Method
from minikv_jax.methods.registry import from_dict, to_dict
from minikv_jax.models.config import ModelConfig

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
    tail = cache.layers[0].tail
    batch, kv_heads, _, head_dim = tail.k.shape
    description = {
        "method": to_dict(cache.layers[0].method),
        "batch": batch,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": str(tail.k.dtype),
        "layers": [
            {
                "packed": layer.packed.capacity,
                "tail": layer.tail.capacity,
                "window": layer.spec.window,
                "layer": layer.spec.layer,
            }
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
    method = from_dict(description["method"])
    batch = description["batch"]
    layers = (
        _blank_layer(LayerSpec(method, sizes["window"], sizes["layer"]), sizes["packed"], sizes["tail"], description)
        for sizes in description["layers"]
    )
    return KVCache(tuple(layers), jnp.zeros((batch,), jnp.int32))


def _blank_layer(spec: LayerSpec, packed: int, tail: int, description: dict) -> LayerCache:
    batch, kv_heads, dim, dtype = (description[name] for name in ("batch", "kv_heads", "head_dim", "dtype"))
    length = jnp.zeros((batch,), jnp.int32)

    def positions(size: int) -> Array | None:
        return None if spec.window is None else jnp.zeros((batch, kv_heads, size), jnp.int32)

    packed_region = empty_region(length)
    if spec.method.quantizer is not None:
        x = jnp.zeros((batch, kv_heads, packed, dim), dtype)
        packed_region = Region(spec.encode(x, "keys"), spec.encode(x, "values"), length, positions(packed))
    full = jnp.zeros((batch, kv_heads, tail, dim), dtype)
    return LayerCache(
        packed_region, Region(full, full, length, positions(tail)), _blank_eviction(spec.method, full.shape[:3]), spec
    )


def _blank_eviction(method: Method, slots: tuple[int, ...]) -> Eviction | None:
    if method.evict_every is None:
        return None
    count = jnp.zeros(slots[:1], jnp.int32)
    return Eviction(jnp.zeros(slots, jnp.float32) if method.heavy else None, count, count)
