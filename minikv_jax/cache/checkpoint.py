"""Saves a compressed cache with its method (Orbax): prefill a long document once, continue from it later."""

from __future__ import annotations

import os
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from minikv_jax import meshes, saved_arrays
from minikv_jax.cache.state import Eviction, KVCache, LayerCache, LayerSpec, Region, empty_region
from minikv_jax.methods.method import Method
from minikv_jax.methods.records import Count, MethodRecord, Size, to_method
from minikv_jax.methods.registry import to_dict
from minikv_jax.models import windows
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.windows import Chunk, Window
from minikv_jax.schemas import Schema

_KIND = "cache"


class LayerRecord(Schema):
    """A layer's capacities, sliding window or chunk, and number."""

    packed: Count
    tail: Count
    window: Size | None
    chunked: bool
    layer: Count

    @property
    def sees(self) -> Window | None:
        """The layer's sliding window or chunk."""
        return Chunk(self.window) if self.window is not None and self.chunked else self.window


class CacheRecord(saved_arrays.Description):
    """Content of cache.json."""

    method: MethodRecord
    batch: Size
    kv_heads: Size
    head_dim: Size
    dtype: Literal["float32", "bfloat16", "float16"]
    layers: list[LayerRecord]


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> None:
    """Saves a cache with its method in a new directory.

    Args:
      cache: a cache on one or several devices of this process.
      path: the directory; must not exist. It appears when it is complete.

    Raises:
      FileExistsError: `path` exists already.
      BlockingIOError: another process is writing `path`.
      OSError: the directory cannot be written, on a full disk for instance. Nothing of it remains.
      NotImplementedError: there are several processes.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(f"{jax.process_count()} processes: a cache can only be saved by a single process")
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
                "window": None if layer.spec.window is None else windows.size(layer.spec.window),
                "chunked": isinstance(layer.spec.window, Chunk),
                "layer": number,
            }
            for number, layer in enumerate(cache.layers)
        ],
    }
    saved_arrays.save(path, cache, description, kind=_KIND)


def restore_cache(path: str | os.PathLike[str], model: ModelConfig, mesh: Mesh | None = None) -> KVCache:
    """Reads a cache saved by `save_cache`, for a model of the same shape.

    Args:
      path: the directory.
      model: config of the model that continues from the cache: `model.config`.
      mesh: devices to split the cache over, independent of those it was saved from; by default the mesh of
        `jax.set_mesh`, else JAX's default device.

    Returns:
      The cache, equal to the saved one, with its own method.

    Raises:
      FileNotFoundError: `path` holds no cache.
      ValueError: the description or the arrays are damaged, the cache was made by a model of another shape (the text
        names what differs), or it cannot be split over the mesh.
    """
    record = saved_arrays.read_description(path, _KIND, CacheRecord)
    source = os.path.join(path, f"{_KIND}.json")
    _check_model(source, record, model)
    method = to_method(record.method, source)
    _check_capacities(source, record, method)
    shapes = jax.eval_shape(lambda: _blank(record, method))
    mesh = meshes.ambient() if mesh is None else mesh
    return saved_arrays.load(path, record, meshes.placed_shapes(shapes, mesh))


def _check_model(source: str, record: CacheRecord, model: ModelConfig) -> None:
    layers = range(model.num_hidden_layers)
    for name, stored, expected in (
        ("layers", len(record.layers), len(layers)),
        ("KV heads", record.kv_heads, model.num_key_value_heads),
        ("head dim", record.head_dim, model.head_dim),
        ("sliding windows", [layer.sees for layer in record.layers], [model.window(layer) for layer in layers]),
        ("layer numbers", [layer.layer for layer in record.layers], list(layers)),
    ):
        if stored != expected:
            raise ValueError(f"{source}: the saved cache has {name} {stored}, the model {expected}")


def _check_capacities(source: str, record: CacheRecord, method: Method) -> None:
    """Raises ValueError for a packed region that is not whole blocks, or that belongs to no quantizer."""
    block = 0 if method.quantizer is None else method.quantizer.block
    for number, layer in enumerate(record.layers):
        if layer.packed % block if block else layer.packed:
            accepted = f"a multiple of {block}" if block else "0, as the method does not quantise"
            raise ValueError(f"{source}: layers[{number}].packed is {layer.packed}; accepted: {accepted}")


def _blank(record: CacheRecord, method: Method) -> KVCache:
    """Makes a cache of zeros with the described structure. Only its shapes are used."""
    layers = (_blank_layer(LayerSpec(method, layer.sees, layer.layer), layer, record) for layer in record.layers)
    return KVCache(tuple(layers), jnp.zeros((record.batch,), jnp.int32))


def _blank_layer(spec: LayerSpec, layer: LayerRecord, record: CacheRecord) -> LayerCache:
    batch, kv_heads, dim = record.batch, record.kv_heads, record.head_dim
    length = jnp.zeros((batch,), jnp.int32)

    def positions(size: int) -> Array | None:
        return None if spec.window is None else jnp.zeros((batch, kv_heads, size), jnp.int32)

    packed_region = empty_region(length)
    if spec.method.quantizer is not None:
        x = jnp.zeros((batch, kv_heads, layer.packed, dim), record.dtype)
        encoded = spec.encode(x, "keys"), spec.encode(x, "values")
        packed_region = Region(*encoded, length, positions(layer.packed))
    full = jnp.zeros((batch, kv_heads, layer.tail, dim), record.dtype)
    return LayerCache(
        packed_region,
        Region(full, full, length, positions(layer.tail)),
        _blank_eviction(spec.method, full.shape[:3]),
        spec,
    )


def _blank_eviction(method: Method, slots: tuple[int, ...]) -> Eviction | None:
    if method.evict_every is None:
        return None
    count = jnp.zeros(slots[:1], jnp.int32)
    return Eviction(jnp.zeros(slots, jnp.float32) if method.heavy else None, count, count)
