"""What a cache costs, by formula: known before anything is allocated, and equal to what is allocated."""

from __future__ import annotations

import dataclasses

from minikv_jax.cache import LayerCapacity, layer_capacity
from minikv_jax.config import PLANES, CacheConfig, ModelConfig
from minikv_jax.selection import layer_budgets

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4}


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache over all layers and rows.

    Attributes:
      packed_bytes: codes, scales and zero points at their capacity: kept and generated tokens. MiniKV's paper counts
        this.
      tail_bytes: the full-precision tail, sinks included.
      index_bytes: lengths, and positions where a layer has a sliding window.
      bytes: everything allocated, `KVCache.nbytes`.
      full_bytes: the same tokens, all of them, in the model's dtype: what an uncompressed cache holds.
      layers: tokens per layer (`kept` of the prompt; capacities of the packed region and of the tail).
      layer_bytes: everything allocated, per layer.
    """

    packed_bytes: int
    tail_bytes: int
    index_bytes: int
    full_bytes: int
    layers: tuple[LayerCapacity, ...]
    layer_bytes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.packed_bytes + self.tail_bytes + self.index_bytes

    @property
    def saved(self) -> float:
        """Share of the full cache's bytes that is saved, everything counted."""
        return 1 - self.bytes / self.full_bytes

    @property
    def packed_saved(self) -> float:
        """Share of the full cache's bytes that is saved if only packed bytes count, as in the paper's 86 %."""
        return 1 - self.packed_bytes / self.full_bytes


def capacities(
    model: ModelConfig, config: CacheConfig, prompt_length: int, max_new_tokens: int
) -> tuple[LayerCapacity, ...]:
    """Each layer's capacities for prompts of at most `prompt_length` tokens."""
    heavy = layer_budgets(config, model.num_hidden_layers)
    return tuple(
        layer_capacity(config, share, prompt_length, max_new_tokens, model.window(layer))
        for layer, share in enumerate(heavy)
    )


def report(
    model: ModelConfig,
    config: CacheConfig,
    *,
    prompt_length: int,
    max_new_tokens: int,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> MemoryReport:
    """Bytes of `batch` rows with prompts of `prompt_length` tokens and `max_new_tokens` generated ones.

    `prompt_length` is the padded length that the cache is made for; `generate` rounds prompts up to a bucket
    (`generate.bucket_length`).

    Raises:
      ValueError: a length or batch below 1, an unknown dtype, or a head_dim that `group_size` does not divide.
    """
    for name, value in (("prompt_length", prompt_length), ("max_new_tokens", max_new_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    check_model(model, config)
    layers = capacities(model, config, prompt_length, max_new_tokens)
    heads, dim, size = model.num_key_value_heads, model.head_dim, _BYTES[dtype]
    packed = [batch * heads * _packed_bytes(layer.packed, dim, config) for layer in layers]
    tail = [batch * heads * 2 * layer.tail * dim * size for layer in layers]
    index = [_index_bytes(layer, batch, heads, model.window(number)) for number, layer in enumerate(layers)]
    return MemoryReport(
        packed_bytes=sum(packed),
        tail_bytes=sum(tail),
        index_bytes=sum(index) + 4 * batch,  # and the sequence lengths
        full_bytes=batch * heads * len(layers) * 2 * (prompt_length + max_new_tokens) * dim * size,
        layers=layers,
        layer_bytes=tuple(map(sum, zip(packed, tail, index, strict=True))),
    )


def _index_bytes(layer: LayerCapacity, batch: int, heads: int, window: int | None) -> int:
    """Two lengths per row, and every token's position where the layer has a window."""
    return 2 * 4 * batch + (0 if window is None else 4 * batch * heads * (layer.packed + layer.tail))


def check_model(model: ModelConfig, config: CacheConfig) -> None:
    """Raises ValueError where the method does not fit the model."""
    if config.quantized and model.head_dim % config.group_size:
        raise ValueError(
            f"head_dim {model.head_dim} is not divisible by group_size {config.group_size}: "
            "values are grouped along channels"
        )


def _packed_bytes(tokens: int, dim: int, config: CacheConfig) -> int:
    """Bytes of K and V of `tokens` packed tokens of one KV head."""
    if config.k_bits is None or config.v_bits is None:
        return 0
    codes = sum(tokens * width // 32 * 4 * dim for bits in (config.k_bits, config.v_bits) for width in PLANES[bits])
    metadata = 2 * 2 * (tokens * dim // config.group_size) * _BYTES[config.metadata_dtype]
    factors = 2 * 2 * 4 * (tokens // config.packing_block) if config.metadata_dtype == "float8_e4m3fn" else 0
    return codes + metadata + factors
