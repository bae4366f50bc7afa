"""Online softmax: attention over parts of the keys, and merging of parts. Used by all attention in plain JAX.

Attention works block by block, so memory is linear in the number of tokens.
Queries of one KV head are handled together (group-major, `Q = G * T`); keys and values are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from minikv_jax.ops.shapes import Scaling

_EXACT = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}


class Partial(NamedTuple):
    """Attention over some of the keys: unnormalised output, running maximum and denominator, per query."""

    acc: Float[Array, "B K Q H"]
    top: Float[Array, "B K Q"]
    total: Float[Array, "B K Q"]


def empty(batch: int, kv_heads: int, queries: int, head_dim: int) -> Partial:
    """Attention over no keys, to merge others into."""
    shape = (batch, kv_heads, queries)
    return Partial(
        jnp.zeros((*shape, head_dim), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Merges attention over two disjoint sets of keys (FlashAttention section 3.1)."""
    top = jnp.maximum(a.top, b.top)
    base = jnp.where(jnp.isfinite(top), top, 0.0)
    scale_a, scale_b = jnp.exp(a.top - base), jnp.exp(b.top - base)
    acc = a.acc * scale_a[..., None] + b.acc * scale_b[..., None]
    return Partial(acc, top, a.total * scale_a + b.total * scale_b)


def merge_sinks(part: Partial, sink_logits: Float[Array, "B N"] | None) -> Partial:
    """Adds one more key per query head, with these logits and a value of zero, to the softmax; none changes nothing."""
    if sink_logits is None:
        return part
    kv_heads, queries = part.top.shape[1:]
    tops = sink_logits.astype(jnp.float32).reshape(-1, kv_heads, sink_logits.shape[1] // kv_heads)
    tops = jnp.repeat(tops, queries // tops.shape[2], axis=2)  # group-major
    return merge(part, Partial(jnp.zeros_like(part.acc), tops, jnp.ones_like(tops)))


def attend(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    seen: Array,
    scale: Scaling,
) -> Partial:
    """Attends with `Q` queries over those of `S` keys that `seen` (broadcastable to `[B, K, Q, S]`) allows."""
    masked = logits(q, k, seen, scale)
    top = jnp.max(masked, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0.0)[..., None])
    # A key that no query may see can hold anything, even NaN. Its weight is 0, but 0 * NaN is NaN: clear its value.
    v = jnp.where(jnp.any(seen, axis=-2)[..., None], v, 0)
    acc = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v, **_EXACT)
    return Partial(acc, top, jnp.sum(weights, axis=-1))


def logits(q: Float[Array, "B K Q H"], k: Float[Array, "B K S H"], seen: Array, scale: Scaling) -> Array:
    """Computes the attention logits in float32; minus infinity for keys that are not seen."""
    return jnp.where(seen, scale.logits(jnp.einsum("bkqh,bksh->bkqs", q, k, **_EXACT)), -jnp.inf)


def finish(part: Partial, group: int, dtype: jnp.dtype) -> Float[Array, "B T N H"]:
    """Normalises the output. Queries that saw no key give zero."""
    out = part.acc / jnp.where(part.total == 0, 1.0, part.total)[..., None]
    batch, kv_heads, queries, dim = out.shape
    return join_heads(out.reshape(batch, kv_heads, group, queries // group, dim)).astype(dtype)


def split_heads(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    """Splits query heads by the KV head that they read."""
    batch, tokens, heads, dim = q.shape
    return q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def join_heads(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """Reverses `split_heads`."""
    batch, kv_heads, group, tokens, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * group, dim)
