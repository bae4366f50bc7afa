"""Decode attention: packed caches against cuDNN over the same tokens in bfloat16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import cuda_ffi
import pallas_kernels
from cuda_ffi import Packed, Region, Storage
from minikv_jax.bench.timing import Benchmark, Row, chain, chained_ms, extra_in_loop_ms, loop

_KERNELS = {"cuda": cuda_ffi.decode_attention, "pallas": pallas_kernels.decode_attention}


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """One decode step with `tokens` packed and `tail` full-precision tokens per row.

    `factor_block` is the number of tokens that share a factor of 8-bit metadata; None is 16-bit metadata.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    bits: int = 2
    group_size: int = 16
    head_dim: int = 128
    tail: int = 0
    factor_block: int | None = None

    @property
    def name(self) -> str:
        metadata = "" if self.factor_block is None else " 8-bit metadata"
        return (
            f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim} "
            f"{self.bits}-bit g{self.group_size}{metadata} tail {self.tail}"
        )


# The formats that presets store: 2 bits in groups of 16 (`minikv`) and 32 (`kivi-2`), and 4 bits in groups of 32, with
# 16-bit metadata (`kivi-4`) and with 8-bit metadata (`twin-4bit`).
SHAPES = (
    DecodeShape(8, 32768, 32, 8),
    DecodeShape(8, 32768, 32, 32),
    DecodeShape(1, 131072, 32, 8),
    DecodeShape(8, 32768, 32, 8, bits=4, group_size=32),
    DecodeShape(8, 32768, 32, 32, bits=4, group_size=32),
    DecodeShape(8, 32768, 32, 8, bits=4, group_size=32, factor_block=32),
    DecodeShape(8, 32768, 32, 32, bits=4, group_size=32, factor_block=32),
    DecodeShape(1, 131072, 32, 8, bits=4, group_size=32, factor_block=32),
    DecodeShape(8, 32768, 32, 8, group_size=32),
    DecodeShape(8, 32768, 32, 8, tail=128),
    DecodeShape(16, 2048, 32, 32, tail=64),
    DecodeShape(16, 2048, 32, 32, tail=32, bits=4, group_size=32, factor_block=32),
    DecodeShape(1, 2048, 32, 32, tail=128),
    DecodeShape(1, 2048, 32, 32, tail=32, bits=4, group_size=32, factor_block=32),
    DecodeShape(1, 2048, 32, 8, tail=32, bits=4, group_size=32, factor_block=32),
    DecodeShape(1, 512, 32, 32, tail=32, bits=4, group_size=32, factor_block=32),
    DecodeShape(1, 4096, 32, 8),
)


class Cache(NamedTuple):
    """The regions that `decode_attention` of either kernel package reads, by their fields' names."""

    packed: Region[Packed]
    tail: Region[jax.Array]


def random_cache(shape: DecodeShape) -> Cache:
    """A cache of random words, metadata and tail."""
    keys = iter(jax.random.split(jax.random.key(1), 12))
    lead = (shape.batch, shape.kv_heads)
    words = (*lead, shape.tokens * shape.bits // 32, shape.head_dim)
    key_rows = (*lead, shape.tokens // shape.group_size, shape.head_dim)
    value_rows = (*lead, shape.tokens, shape.head_dim // shape.group_size)
    tail = (*lead, max(shape.tail, 16), shape.head_dim)

    metadata_dtype = jnp.float16 if shape.factor_block is None else jnp.float8_e4m3fn

    def metadata(size: tuple[int, ...]) -> jax.Array:
        return (0.2 + jax.random.uniform(next(keys), size)).astype(metadata_dtype)

    def factors() -> tuple[jax.Array, jax.Array] | None:
        if shape.factor_block is None:
            return None
        size = (*lead, shape.tokens // shape.factor_block, 1)
        return jax.random.uniform(next(keys), size), jax.random.uniform(next(keys), size)

    def packed(rows: tuple[int, ...]) -> Packed:
        words_of_codes = jax.random.bits(next(keys), words, jnp.uint32)
        return Packed((words_of_codes,), metadata(rows), -metadata(rows), factors())

    def lengths(tokens: int) -> jax.Array:
        return jnp.full((shape.batch,), tokens, jnp.int32)

    tail_k, tail_v = (jax.random.normal(next(keys), tail, jnp.bfloat16) for _ in "kv")
    return Cache(
        Region(packed(key_rows), packed(value_rows), lengths(shape.tokens)), Region(tail_k, tail_v, lengths(shape.tail))
    )


def stored_bytes(shape: DecodeShape) -> int:
    """Bytes of the valid tokens: codes, scales, zero points and their factors, and the tail."""
    values = 2 * shape.batch * shape.kv_heads * shape.head_dim
    metadata_bits = 16 / shape.group_size
    if shape.factor_block is not None:
        metadata_bits = 8 / shape.group_size + 32 / (shape.factor_block * shape.head_dim)
    packed_bits = shape.bits + 2 * metadata_bits
    return round(values * (shape.tokens * packed_bits / 8 + shape.tail * 2))


def bench_decode(shape: DecodeShape, rate: dict[str, float]) -> Benchmark:
    """A row per implementation: milliseconds per call in a chain, stored bytes read per second, and cuDNN's time."""
    q = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.head_dim), jnp.bfloat16)
    dense = jax.ShapeDtypeStruct((shape.batch, shape.tokens + shape.tail, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    cache = jax.eval_shape(lambda: random_cache(shape))
    programs = {"cudnn": chain(_cudnn, q, dense, dense)}
    for name, kernel in _KERNELS.items():
        step = functools.partial(_decode, kernel, shape)
        programs |= {f"{name} chain": chain(step, q, cache), f"{name} loop": loop(step, q, cache)}

    def measure(programs: Mapping[str, Any]) -> Iterator[Row]:
        queries, k, v = (
            jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((q, dense, dense))
        )
        cudnn_ms = chained_ms(programs["cudnn"], queries, k, v)
        del k, v
        arguments = queries, random_cache(shape)
        for name in _KERNELS:
            chained, looped = programs[f"{name} chain"], programs[f"{name} loop"]
            ms = chained_ms(chained, *arguments)
            yield _row(shape, name, ms, extra_in_loop_ms(looped, chained, *arguments), cudnn_ms, rate)

    return Benchmark(programs, measure)


def _row(
    shape: DecodeShape, implementation: str, ms: float, extra_in_loop: float, cudnn_ms: float, rate: dict[str, float]
) -> Row:
    sizes = {"batch": shape.batch, "tokens": shape.tokens + shape.tail, "heads": shape.heads}
    sizes |= {"kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "bits": shape.bits}
    achieved = stored_bytes(shape) / ms * 1e3
    return {
        "op": "decode_attention",
        "shape": shape.name,
        "sizes": sizes,
        "implementation": implementation,
        "ms": ms,
        "extra_in_loop_ms": extra_in_loop,
        "stored_bytes": stored_bytes(shape),
        "bytes_per_s": achieved,
        "fraction_of_floor": achieved / rate["read_bytes_per_s"],
        "cudnn_bf16_ms": cudnn_ms,
        "times_faster_than_cudnn": cudnn_ms / ms,
    }


def _decode(kernel: Callable[..., jax.Array], shape: DecodeShape, q: jax.Array, cache: Cache) -> jax.Array:
    storage = Storage(shape.bits, shape.bits, shape.group_size)
    return kernel(q, cache.packed, cache.tail, storage=storage, scale=shape.head_dim**-0.5)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn")[:, 0]
