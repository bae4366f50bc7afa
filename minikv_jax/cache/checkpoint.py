"""A compressed cache on disk (Orbax), with the method that made it: prefill a long document once, continue it later."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minikv_jax import files
from minikv_jax.cache.state import Eviction, KVCache, LayerCache, LayerSpec, Region, empty_region
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import from_dict, to_dict
from minikv_jax.models.config import ModelConfig

_KIND = "cache"


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> None:
    """Writes `cache` into the new directory `path`.

    Raises:
      FileExistsError: something is at `path` already.
    """
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
    files.save_arrays(path, cache, description, kind=_KIND)


def restore_cache(path: str | os.PathLike[str], model: ModelConfig) -> KVCache:
    """Reads what `save_cache` wrote, for a model of the same shape.

    Raises:
      FileNotFoundError: `path` holds no cache.
      ValueError: the description is damaged, or the cache was made by a model of another shape; the text names what
        differs.
    """
    description = files.read_description(path, _KIND)
    _check_model(description, model)
    return files.load_arrays(path, jax.eval_shape(lambda: _blank(description)))


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
