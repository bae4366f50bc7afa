"""Benchmark of quantising and packing keys and values, against a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from minikv_jax.bench.timing import Benchmark, Row, kernel_ms
from minikv_jax.ops.quantize import quantize
from minikv_jax.packing import Axis, Packing


def bench_quantize(axis: Axis, implementation: str, rate: dict[str, float]) -> Benchmark:
    """Packs B8 S32768 K32 H128 bfloat16 into 2-bit groups of 16; bytes are those read and written."""
    like = jax.ShapeDtypeStruct((8, 32, 32768, 128), jnp.bfloat16)

    def run(x: jax.Array) -> Any:
        return quantize(x, Packing(bits=2, group_size=16, axis=axis), implementation=implementation)

    def measure(programs: Mapping[str, Any]) -> Iterator[Row]:
        x = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
        ms = kernel_ms(programs["quantize"], x)
        moved = x.nbytes + sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(jax.eval_shape(run, x)))
        achieved = moved / ms * 1e3
        yield {
            "op": "quantize",
            "shape": f"B8 S32768 K32 H128 2-bit g16 by {axis}",
            "sizes": {"batch": 8, "tokens": 32768, "kv_heads": 32, "head_dim": 128, "bits": 2},
            "implementation": implementation,
            "ms": ms,
            "bytes_per_s": achieved,
            "fraction_of_floor": achieved / rate["copy_bytes_per_s"],
        }

    return Benchmark({"quantize": jax.jit(run).lower(like)}, measure)
