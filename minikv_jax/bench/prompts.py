"""Shapes and arrays of the kernel benchmarks that read a whole prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PromptShape:
    """A batch of prompts of `tokens` tokens each."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim}"

    def abstract(self) -> tuple[Any, Any, Any, Any]:
        """Shapes and dtypes of q, k, v in bfloat16, and of the lengths."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (jax.ShapeDtypeStruct((self.batch, self.tokens, n, self.head_dim), jnp.bfloat16) for n in heads)
        return q, k, v, jax.ShapeDtypeStruct((self.batch,), jnp.int32)

    def random(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Random q, k and v, and the lengths of full rows."""
        *like, lengths = self.abstract()
        q, k, v = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(like))
        return q, k, v, jnp.full(lengths.shape, self.tokens, jnp.int32)
