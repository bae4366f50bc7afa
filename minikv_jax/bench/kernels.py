"""Kernel benchmark: op x shape, with cuDNN on the same tokens and the device's own rates, in one process.

`python -m minikv_jax.bench.kernels --output results.json`.

Times are medians of warm runs on random data, the sum of a call's kernels as the profiler sees them; "per call" is the
time of one call inside a long `fori_loop`, launches included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

import cuda_ffi
from cuda_ffi.bandwidth import read_checksum
from cuda_ffi.prefill_attention import column_sums, row_log_sum_exp

_ITERATIONS = 15
_LOOP = 1000


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """One decode step: `tokens` packed tokens a row and `tail` full-precision ones."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    bits: int = 2
    group_size: int = 16
    head_dim: int = 128
    tail: int = 0

    @property
    def name(self) -> str:
        return (
            f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim} "
            f"{self.bits}-bit g{self.group_size} tail {self.tail}"
        )


DECODE_SHAPES = (
    DecodeShape(8, 32768, 32, 8),
    DecodeShape(8, 32768, 32, 32),
    DecodeShape(1, 131072, 32, 8),
    DecodeShape(8, 32768, 32, 8, bits=4, group_size=32),
    DecodeShape(8, 32768, 32, 32, bits=4, group_size=32),
    DecodeShape(8, 32768, 32, 8, group_size=32),
    DecodeShape(8, 32768, 32, 8, tail=128),
    DecodeShape(1, 4096, 32, 8),
)


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """One prompt a row, of `tokens` tokens."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim}"


PREFILL_SHAPES = (
    PrefillShape(1, 32768, 32, 8),
    PrefillShape(1, 8192, 32, 8),
    PrefillShape(8, 4096, 32, 32),
    PrefillShape(1, 8192, 32, 8, head_dim=64),
)


def kernel_ms(function: Callable[..., Any], *arguments: Any) -> float:
    """Median device time of a call, in ms."""
    compiled = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(compiled(*arguments))
    _, times = profiler.measure(compiled, iterations=_ITERATIONS)(*arguments)
    return statistics.median(float(t) for t in times or ())


def per_call_ms(step: Callable[[jax.Array], jax.Array], start: jax.Array) -> float:
    """Wall time of one of `_LOOP` calls inside a loop, best of three, in ms."""
    looped = jax.jit(lambda x: lax.fori_loop(0, _LOOP, lambda _, x: step(x), x))
    jax.block_until_ready(looped(start))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(looped(start))
        best = min(best, time.perf_counter() - begin)
    return 1e3 * best / _LOOP


def rates() -> dict[str, float]:
    """Bytes a second this device reads, and copies (read plus written)."""
    words = jax.random.bits(jax.random.key(0), (1 << 30,), jnp.uint32)
    read = words.nbytes / kernel_ms(read_checksum, words) * 1e3
    copy = 2 * words.nbytes / kernel_ms(lambda x: x ^ 1, words) * 1e3
    return {"read_bytes_per_s": read, "copy_bytes_per_s": copy}


def random_cache(shape: DecodeShape) -> dict[str, Any]:
    """The cache arguments of `cuda_ffi.decode_attention`: random words, metadata and tail."""
    keys = iter(jax.random.split(jax.random.key(1), 8))
    lead = (shape.batch, shape.kv_heads)
    words = (*lead, shape.tokens * shape.bits // 32, shape.head_dim)
    key_rows = (*lead, shape.tokens // shape.group_size, shape.head_dim)
    value_rows = (*lead, shape.tokens, shape.head_dim // shape.group_size)
    tail = (*lead, max(shape.tail, 16), shape.head_dim)

    def metadata(size: tuple[int, ...]) -> jax.Array:
        return (0.2 + jax.random.uniform(next(keys), size)).astype(jnp.float16)

    return {
        "k_planes": (jax.random.bits(next(keys), words, jnp.uint32),),
        "k_scale": metadata(key_rows),
        "k_zero": -metadata(key_rows),
        "v_planes": (jax.random.bits(next(keys), words, jnp.uint32),),
        "v_scale": metadata(value_rows),
        "v_zero": -metadata(value_rows),
        "tail_k": jax.random.normal(next(keys), tail, jnp.bfloat16),
        "tail_v": jax.random.normal(next(keys), tail, jnp.bfloat16),
    }


def bench_decode(shape: DecodeShape, rate: dict[str, float]) -> dict[str, Any]:
    """The packed decode step, and cuDNN over the same tokens in bfloat16."""
    cache = random_cache(shape)
    stored = sum(x.nbytes for name, x in _leaves(cache) if "tail" not in name)
    stored += 2 * shape.batch * shape.kv_heads * shape.tail * shape.head_dim * 2
    q = jax.random.normal(jax.random.key(2), (shape.batch, shape.heads, shape.head_dim), jnp.bfloat16)
    packed = jnp.full((shape.batch,), shape.tokens, jnp.int32)
    tail = jnp.full((shape.batch,), shape.tail, jnp.int32)

    def decode(q: jax.Array, cache: dict[str, Any]) -> jax.Array:
        return cuda_ffi.decode_attention(
            q,
            **cache,
            packed_length=packed,
            tail_length=tail,
            k_bits=shape.bits,
            v_bits=shape.bits,
            group_size=shape.group_size,
        )

    ms, looped = kernel_ms(decode, q, cache), per_call_ms(lambda q: decode(q, cache), q)
    del cache
    k, v = (
        jax.random.normal(jax.random.key(i), (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim), jnp.bfloat16)
        for i in (3, 4)
    )
    cudnn = kernel_ms(lambda q, k, v: jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn"), q, k, v)
    achieved = stored / ms * 1e3
    return {
        "op": "decode_attention",
        "shape": shape.name,
        "implementation": "cuda",
        "ms": ms,
        "per_call_in_loop_ms": looped,
        "stored_bytes": stored,
        "bytes_per_s": achieved,
        "fraction_of_floor": achieved / rate["read_bytes_per_s"],
        "cudnn_bf16_ms": cudnn,
        "times_faster_than_cudnn": cudnn / ms,
    }


def bench_quantize(axis: str, rate: dict[str, float]) -> dict[str, Any]:
    """2-bit groups of 16 over B8 S32768 K32 H128 bfloat16."""
    x = jax.random.normal(jax.random.key(0), (8, 32, 32768, 128), jnp.bfloat16)

    def run(x: jax.Array) -> Any:
        return cuda_ffi.quantize(x, bits=2, group_size=16, axis=axis)

    ms = kernel_ms(run, x)
    moved = x.nbytes + sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(jax.eval_shape(run, x)))
    achieved = moved / ms * 1e3
    return {
        "op": "quantize",
        "shape": f"B8 S32768 K32 H128 2-bit g16 by {axis}",
        "implementation": "cuda",
        "ms": ms,
        "bytes_per_s": achieved,
        "fraction_of_floor": achieved / rate["copy_bytes_per_s"],
    }


def bench_prefill(shape: PrefillShape) -> dict[str, Any]:
    """Causal attention with column sums, its two passes by themselves, and cuDNN's attention alone."""
    sizes = ((shape.batch, shape.tokens, heads, shape.head_dim) for heads in (shape.heads, *[shape.kv_heads] * 2))
    q, k, v = (jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i, size in enumerate(sizes))
    lengths = jnp.full((shape.batch,), shape.tokens, jnp.int32)
    row = row_log_sum_exp(q, k, lengths)

    def prefill(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return cuda_ffi.prefill_attention(q, k, v, lengths, with_scores=True)

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    ms, cudnn_ms = kernel_ms(prefill, q, k, v), kernel_ms(cudnn, q, k, v)
    return {
        "op": "prefill_attention",
        "shape": shape.name,
        "implementation": "cuda",
        "ms": ms,
        "row_log_sum_exp_ms": kernel_ms(lambda q, k: row_log_sum_exp(q, k, lengths), q, k),
        "column_sums_ms": kernel_ms(lambda q, k, row: column_sums(q, k, lengths, row), q, k, row),
        "cudnn_bf16_ms": cudnn_ms,
        "times_faster_than_cudnn": cudnn_ms / ms,
    }


def _leaves(cache: dict[str, Any]) -> list[tuple[str, jax.Array]]:
    return [(name, leaf) for name, value in cache.items() for leaf in jax.tree.leaves(value)]


def _line(row: dict[str, Any]) -> str:
    line = f"{row['op']:18}{row['shape']:50}{row['ms']:9.4f} ms"
    if "bytes_per_s" in row:
        line += f" {row['bytes_per_s'] / 1e9:6.0f} GB/s {row['fraction_of_floor']:6.1%} of the floor"
    if "column_sums_ms" in row:
        line += f" (rows {row['row_log_sum_exp_ms']:.4f}, columns {row['column_sums_ms']:.4f})"
    if "cudnn_bf16_ms" in row:
        line += f"  {row['times_faster_than_cudnn']:.2f} x cuDNN"
    return line


def main(arguments: list[str] | None = None) -> None:
    """Runs everything and writes one JSON file."""
    parser = argparse.ArgumentParser(description="Times the CUDA kernels on this machine's GPU.")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(arguments)
    reason = cuda_ffi.why_unavailable()
    if reason:
        parser.error(reason)
    rate = rates()
    rows = [bench_decode(shape, rate) for shape in DECODE_SHAPES]
    rows += [bench_quantize(axis, rate) for axis in ("tokens", "channels")]
    rows += [bench_prefill(shape) for shape in PREFILL_SHAPES]
    device = jax.devices("gpu")[0]
    report = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "backend": device.client.platform_version.splitlines()[0],
        "command": "python -m minikv_jax.bench.kernels",
        **rate,
        "results": rows,
    }
    for row in rows:
        sys.stdout.write(_line(row) + "\n")
    if options.output:
        with open(options.output, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
