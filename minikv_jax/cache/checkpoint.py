"""Saves a compressed cache with its method (Orbax): prefill a long document once, continue from it later."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from pydantic import Field

from minikv_jax import meshes, saved_arrays
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec, check_heads_stay_together
from minikv_jax.cache.state import Eviction, HeadGroups, LayerCache, Region, empty_region
from minikv_jax.methods.method import Method
from minikv_jax.methods.records import Count, MethodRecord, Size, to_method
from minikv_jax.methods.registry import to_dict
from minikv_jax.models import windows
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.windows import Chunk, Window
from minikv_jax.schemas import Schema

_KIND = "cache"


class PartRecord(Schema):
    """Capacities of a part of a layer's cache."""

    packed: Count
    tail: Count


class LayerRecord(Schema):
    """The parts of a layer's cache, its sliding window or chunk, and its number."""

    parts: Annotated[list[PartRecord], Field(min_length=1, max_length=2)]
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
    tails = [part.tail.k for part in cache.layers[0].parts]
    batch, _, _, head_dim = tails[0].shape
    description = {
        "method": to_dict(cache.layers[0].method),
        "batch": batch,
        "kv_heads": sum(tail.shape[1] for tail in tails),
        "head_dim": head_dim,
        "dtype": str(tails[0].dtype),
        "layers": [
            {
                "parts": [{"packed": part.packed.capacity, "tail": part.tail.capacity} for part in layer.parts],
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
      NotImplementedError: the mesh splits heads, and the cache has retrieval heads.
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
    if mesh is not None:
        check_heads_stay_together(method, mesh.shape.get(meshes.MODEL, 1))
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
        groups = _groups(method, layer, record)
        if len(layer.parts) != len(groups):
            raise ValueError(f"{source}: layers[{number}].parts are {len(layer.parts)}; accepted: {len(groups)}")
        for i, part in enumerate(layer.parts):
            if part.packed % block if block else part.packed:
                accepted = f"a multiple of {block}" if block else "0, as the method does not quantise"
                raise ValueError(f"{source}: layers[{number}].parts[{i}].packed is {part.packed}; accepted: {accepted}")


def _groups(method: Method, layer: LayerRecord, record: CacheRecord) -> dict[tuple[int, ...], LayerSpec]:
    """Specs of the parts of a layer's cache, by KV heads."""
    return LayerSpec(method, layer.sees, layer.layer).by_heads(record.kv_heads)


def _blank(record: CacheRecord, method: Method) -> KVCache:
    """Makes a cache of zeros with the described structure. Only its shapes are used."""
    return KVCache(
        tuple(_blank_layer(method, layer, record) for layer in record.layers), jnp.zeros((record.batch,), jnp.int32)
    )


def _blank_layer(method: Method, layer: LayerRecord, record: CacheRecord) -> LayerCache | HeadGroups:
    groups = _groups(method, layer, record)
    spec = LayerSpec(method, layer.sees, layer.layer)
    if not spec.retrieval_heads:
        return _blank_part(spec, record.kv_heads, layer.parts[0], record)
    parts = zip(groups.items(), layer.parts, strict=True)
    return HeadGroups(
        tuple(_blank_part(own, len(heads), part, record) for (heads, own), part in parts), tuple(groups), spec
    )


def _blank_part(spec: LayerSpec, kv_heads: int, part: PartRecord, record: CacheRecord) -> LayerCache:
    batch, dim = record.batch, record.head_dim
    length = jnp.zeros((batch,), jnp.int32)

    def positions(size: int) -> Array | None:
        return None if spec.window is None else jnp.zeros((batch, kv_heads, size), jnp.int32)

    packed_region = empty_region(length)
    if spec.method.quantizer is not None:
        x = jnp.zeros((batch, kv_heads, part.packed, dim), record.dtype)
        encoded = spec.encode(x, "keys"), spec.encode(x, "values")
        packed_region = Region(*encoded, length, positions(part.packed))
    full = jnp.zeros((batch, kv_heads, part.tail, dim), record.dtype)
    return LayerCache(
        packed_region,
        Region(full, full, length, positions(part.tail)),
        _blank_eviction(spec.method, full.shape[:3]),
        spec,
    )


def _blank_eviction(method: Method, slots: tuple[int, ...]) -> Eviction | None:
    if method.evict_every is None:
        return None
    count = jnp.zeros(slots[:1], jnp.int32)
    return Eviction(jnp.zeros(slots, jnp.float32) if method.heavy else None, count, count)
