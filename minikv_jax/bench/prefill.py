"""Causal attention over a prompt with the score of each key, against cuDNN's attention without scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cuda_ffi.prefill_attention import column_sums, row_log_sum_exp
from minikv_jax.bench.prompts import PromptShape
from minikv_jax.bench.timing import Benchmark, Row, alternating_ms, kernel_ms
from minikv_jax.ops.prefill_attention import prefill_attention

_IMPLEMENTATIONS = ("cuda", "pallas")

SHAPES = (
    PromptShape(1, 32768, 32, 8),
    PromptShape(1, 8192, 32, 8),
    PromptShape(8, 4096, 32, 32),
    PromptShape(1, 8192, 32, 8, head_dim=64),
)


def bench_prefill(shape: PromptShape) -> Benchmark:
    """A row per implementation: attention with scores, and cuDNN's without."""
    q, k, v, lengths = shape.abstract()
    row = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.tokens), jnp.float32)
    scale = shape.head_dim**-0.5
    programs = {
        "cudnn": jax.jit(_cudnn).lower(q, k, v),
        "rows": jax.jit(functools.partial(row_log_sum_exp, scale=scale)).lower(q, k, lengths),
        "columns": jax.jit(functools.partial(column_sums, scale=scale)).lower(q, k, lengths, row),
    }
    programs |= {x: jax.jit(functools.partial(_attend, x)).lower(q, k, v, lengths) for x in _IMPLEMENTATIONS}
    return Benchmark(programs, functools.partial(_measure, shape))


def _measure(shape: PromptShape, programs: Mapping[str, Any]) -> Iterator[Row]:
    q, k, v, lengths = shape.random()
    for name in _IMPLEMENTATIONS:
        cudnn_ms, ms = alternating_ms((programs["cudnn"], (q, k, v)), (programs[name], (q, k, v, lengths)))
        result = {
            "op": "prefill_attention",
            "shape": shape.name,
            "sizes": dataclasses.asdict(shape),
            "implementation": name,
            "ms": ms,
            "cudnn_bf16_ms": cudnn_ms,
            "times_cudnn": ms / cudnn_ms,
        }
        if name == "cuda":
            row = programs["rows"](q, k, lengths)
            result["row_log_sum_exp_ms"] = kernel_ms(programs["rows"], q, k, lengths)
            result["column_sums_ms"] = kernel_ms(programs["columns"], q, k, lengths, row)
        yield result


def _attend(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> Any:
    return prefill_attention(q, k, v, lengths, with_scores=True, implementation=implementation)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
