"""Causal attention over a prompt with the score of each key, against cuDNN's attention alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cuda_ffi.prefill_attention import column_sums, row_log_sum_exp
from minikv_jax.attention import prefill_attention
from minikv_jax.bench.timing import kernel_ms


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """A batch of prompts of `tokens` tokens each."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim}"


SHAPES = (
    PrefillShape(1, 32768, 32, 8),
    PrefillShape(1, 8192, 32, 8),
    PrefillShape(8, 4096, 32, 32),
    PrefillShape(1, 8192, 32, 8, head_dim=64),
)


def bench_prefill(shape: PrefillShape) -> Iterator[dict[str, Any]]:
    """One row per implementation that takes the shape: attention with scores, and cuDNN without."""
    sizes = ((shape.batch, shape.tokens, heads, shape.head_dim) for heads in (shape.heads, *[shape.kv_heads] * 2))
    q, k, v = (jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i, size in enumerate(sizes))
    lengths = jnp.full((shape.batch,), shape.tokens, jnp.int32)

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    cudnn_ms = kernel_ms(cudnn, q, k, v)
    for implementation in ("cuda", "pallas"):

        def run(q: jax.Array, k: jax.Array, v: jax.Array, name: str = implementation) -> Any:
            return prefill_attention(q, k, v, lengths, with_scores=True, implementation=name)

        ms = kernel_ms(run, q, k, v)
        row = {
            "op": "prefill_attention",
            "shape": shape.name,
            "sizes": dataclasses.asdict(shape),
            "implementation": implementation,
            "ms": ms,
            "cudnn_bf16_ms": cudnn_ms,
            "times_cudnn": ms / cudnn_ms,
        }
        yield row | (_passes(q, k, lengths) if implementation == "cuda" else {})


def _passes(q: jax.Array, k: jax.Array, lengths: jax.Array) -> dict[str, float]:
    row = row_log_sum_exp(q, k, lengths)
    return {
        "row_log_sum_exp_ms": kernel_ms(lambda q, k: row_log_sum_exp(q, k, lengths), q, k),
        "column_sums_ms": kernel_ms(lambda q, k, row: column_sums(q, k, lengths, row), q, k, row),
    }
