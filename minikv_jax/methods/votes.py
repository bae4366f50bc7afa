"""Votes of the newest queries: column sums of the softmax map over a row's last queries (SnapKV section 4)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import LayerInputs
from minikv_jax.models import windows

_VOTERS = 32  # queries at a time, because their weights over all keys are in memory


def window_votes(inputs: LayerInputs, size: int) -> Float[Array, "B K T"]:
    """Sums the softmax map over each row's last `size` queries; float32, zero in the padding."""
    q, k, lengths, window = inputs.q, inputs.k, inputs.lengths, inputs.window
    batch, tokens, heads, dim = q.shape
    kv_heads, keys = k.shape[2], jnp.arange(tokens)
    voters = min(size, _VOTERS)
    sinks = None
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)

    def add(block: Array | int, votes: Array) -> Array:
        back = block * voters + jnp.arange(voters)  # 0 for the row's last query
        positions = jnp.where(back < size, lengths[:, None] - 1 - back, -1)  # [B, w], negative: no such query
        rows = jnp.take_along_axis(q, jnp.maximum(positions, 0)[:, :, None, None], axis=1)
        rows = rows.reshape(batch, voters, kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("bwkgh,bskh->bkgws", rows, k, preferred_element_type=jnp.float32, precision="highest")
        seen = keys <= positions[:, :, None]  # [B, w, T]
        if window is not None:
            seen &= keys >= windows.oldest(window, positions[:, :, None])
        logits = logits * dim**-0.5
        if inputs.soft_cap is not None:
            logits = inputs.soft_cap * jnp.tanh(logits / inputs.soft_cap)
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        if sinks is not None:
            top = jnp.maximum(top, sinks)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total += jnp.exp(sinks - top)
        return votes + jnp.sum(weights / jnp.where(total == 0, 1.0, total), axis=(2, 3))

    votes = jnp.zeros((batch, kv_heads, tokens), jnp.float32)
    return add(0, votes) if size == voters else lax.fori_loop(0, -(-size // voters), add, votes)


def pool(votes: Float[Array, "B K T"], lengths: Int[Array, "B"], kind: str, kernel: int) -> Float[Array, "B K T"]:
    """Pools the first `lengths` votes of a row by "max" or "mean" (`kind`) over `kernel` tokens, an odd number.

    Returns:
      The pooled votes; those after the first `lengths` as they are.
    """
    pooled_tokens = jnp.arange(votes.shape[-1]) < lengths[:, None, None]
    reach = kernel // 2
    dims, padding = (1, 1, kernel), ((0, 0), (0, 0), (reach, reach))
    if kind == "max":
        inner = jnp.where(pooled_tokens, votes, -jnp.inf)
        pooled = lax.reduce_window(inner, -jnp.inf, lax.max, dims, (1, 1, 1), padding)
    else:
        inner = jnp.where(pooled_tokens, votes, 0.0)
        pooled = lax.reduce_window(inner, 0.0, lax.add, dims, (1, 1, 1), padding) / kernel
    return jnp.where(pooled_tokens, pooled, votes)


def rank(scores: Float[Array, "B K T"]) -> Int[Array, "B K T"]:
    """Ranks tokens: 0 for the highest score of a row and KV head. Equal scores rank in order of position."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
