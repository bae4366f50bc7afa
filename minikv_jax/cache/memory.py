"""Bytes of a cache, computed from shapes before anything is allocated. They match the allocation exactly."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax.typing import DTypeLike

from minikv_jax.cache.capacity import LayerCapacity, capacities
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.checks import choice, integer
from minikv_jax.methods import calls, contracts
from minikv_jax.methods.base import MAX_TOKENS, Quantizer
from minikv_jax.methods.lookup import resolve
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.parameters import Skeleton
from minikv_jax.models.windows import Window

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache over all layers and rows.

    Attributes:
      packed_bytes: codes, scales and zero points at capacity, for kept and generated tokens. MiniKV's paper counts
        these.
      tail_bytes: the full-precision tail, sinks included.
      index_bytes: lengths; positions in layers with a sliding window; scores and budgets with `evict_every`.
      bytes: everything allocated; equals `KVCache.nbytes`.
      full_bytes: an uncompressed cache: all tokens in the model's dtype.
      layers: tokens per layer: kept prompt tokens, and capacities of the packed region and the tail; likewise of the
        retrieval heads.
      layer_bytes: everything allocated, per layer.
      row_bytes: the part of `index_bytes` in arrays without an axis of heads.
    """

    packed_bytes: int
    tail_bytes: int
    index_bytes: int
    full_bytes: int
    layers: tuple[LayerCapacity, ...]
    layer_bytes: tuple[int, ...]
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.packed_bytes + self.tail_bytes + self.index_bytes

    def device_bytes(self, data: int, model: int) -> int:
        """Computes the bytes on each device of a mesh.

        Args:
          data: number of parts that the rows are split into.
          model: number of parts that the heads are split into.
        """
        return (self.bytes - self.row_bytes) // (data * model) + self.row_bytes // data

    def step_saved(self, weight_bytes: int) -> float:
        """Ratio of bytes that a decode step reads with a full cache and with this one: the largest possible speedup.

        A step reads the weights once for all rows and, at the end of generation, the whole cache.

        Args:
          weight_bytes: bytes of the weights that a step reads, from the function `weight_bytes`.
        """
        return (weight_bytes + self.full_bytes) / (weight_bytes + self.bytes)

    @property
    def saved(self) -> float:
        """Saved share of the full cache's bytes, counting everything."""
        return 1 - self.bytes / self.full_bytes

    @property
    def packed_saved(self) -> float:
        """Saved share of the full cache's bytes, counting only packed bytes as the paper's 86% does."""
        return 1 - self.packed_bytes / self.full_bytes


def report(
    model: ModelConfig,
    method: str | Method,
    *,
    prompt_length: int,
    max_new_tokens: int,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> MemoryReport:
    """Computes the bytes of a cache.

    Args:
      model: config of the model.
      method: a `Method` or a name.
      prompt_length: padded length of the prompts in tokens; `generate` rounds prompts up to a bucket
        (`prompts.bucket_length`).
      max_new_tokens: tokens that will be generated per row.
      batch: rows.
      dtype: the model's dtype: "float32", "bfloat16" or "float16".

    Returns:
      Bytes by part and by layer, and the bytes of an uncompressed cache.

    Raises:
      ValueError: a length or batch below 1, an unknown dtype, or a method that does not fit the model.
    """
    for name, value in (("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens), ("batch", batch)):
        integer(name, value, 1, MAX_TOKENS)
    choice("dtype", dtype, tuple(_BYTES))
    method = resolve(method)
    contracts.check(method, model)
    layers = capacities(model, method, prompt_length, max_new_tokens)
    heads, dim, size = model.num_key_value_heads, model.head_dim, _BYTES[dtype]
    parts = [_parts(method, number, layer, heads) for number, layer in enumerate(layers)]
    packed = _packed_bytes(model, method, parts, batch, dtype)
    tail = [sum(batch * count * 2 * part.tail * dim * size for count, part in own) for own in parts]
    index = [
        sum(_index_bytes(method, part, batch, count, model.window(number)) for count, part in own)
        for number, own in enumerate(parts)
    ]
    return MemoryReport(
        packed_bytes=sum(packed),
        tail_bytes=sum(tail),
        index_bytes=sum(index) + 4 * batch,  # and the sequence lengths
        full_bytes=batch * heads * len(layers) * 2 * (prompt_length + max_new_tokens) * dim * size,
        layers=layers,
        layer_bytes=tuple(map(sum, zip(packed, tail, index, strict=True))),
        row_bytes=4 * batch * (1 + sum(map(len, parts)) * (2 if method.evict_every is None else 4)),
    )


_Parts = list[tuple[int, LayerCapacity]]  # KV heads and sizes of the parts of a layer's cache


def _parts(method: Method, layer: int, capacity: LayerCapacity, heads: int) -> _Parts:
    groups = LayerSpec(method, layer=layer).by_heads(heads)
    sizes = [capacity.retrieval, capacity] if capacity.retrieval is not None else [capacity]
    return [(len(own), size) for own, size in zip(groups, sizes, strict=False)]


def _packed_bytes(model: ModelConfig, method: Method, layers: list[_Parts], batch: int, dtype: str) -> list[int]:
    quantizer = method.quantizer
    if quantizer is None:
        return [0] * len(layers)

    @functools.cache
    def block_bytes(number: int, heads: int) -> int:
        return _block_bytes(quantizer, number, heads, model.head_dim, dtype)

    def of_part(number: int, heads: int, part: LayerCapacity) -> int:
        return batch * part.packed // quantizer.block * block_bytes(number if quantizer.by_layer else 0, heads)

    return [sum(of_part(number, heads, part) for heads, part in parts) for number, parts in enumerate(layers)]


def _block_bytes(quantizer: Quantizer, layer: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of the keys and values in one packing block of a row, all heads, from the shapes of `encode`."""
    block = jax.ShapeDtypeStruct((1, kv_heads, quantizer.block, head_dim), dtype)
    operands = quantizer.operand("keys", layer), quantizer.operand("values", layer)
    stored = [
        jax.eval_shape(lambda x, operand=operand: calls.encode(quantizer, x, operand), block) for operand in operands
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


@functools.lru_cache(maxsize=64)
def weight_bytes(model: ModelConfig, dtype: str = "bfloat16") -> int:
    """Computes the bytes of the weights that a decode step reads.

    An embedding table that only looks up tokens is not counted. All experts of a mixture are, though a step of few rows
    reads few of them.

    Args:
      model: config of the model.
      dtype: the model's dtype: "float32", "bfloat16" or "float16".
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in Skeleton.of(model, dtype).parameters.items()}
    if not model.tie_word_embeddings:
        del sizes["embed_tokens.embedding"]
    return _BYTES[dtype] * sum(sizes.values())


def _index_bytes(method: Method, layer: LayerCapacity, batch: int, heads: int, window: Window | None) -> int:
    """Bytes of two lengths per row, of positions if the layer has a window, and of the eviction state."""
    positions = 0 if window is None else 4 * batch * heads * (layer.packed + layer.tail)
    eviction = 0
    if method.evict_every is not None:
        eviction = 2 * 4 * batch + (4 * batch * heads * layer.tail if method.heavy else 0)
    return 2 * 4 * batch + positions + eviction
