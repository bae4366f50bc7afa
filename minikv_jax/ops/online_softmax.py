"""The three ops in plain jax.numpy: the meaning of every kernel, and the "xla" implementation.

All of them work block by block with an online softmax, so memory is linear in the number of tokens. Queries of one KV
head are handled together; keys and values are never repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import MAX_BLOCK

if TYPE_CHECKING:
    from minikv_jax.cache.state import LayerCache

BLOCK = 256  # tokens of a prefill block
DECODE_BLOCK = MAX_BLOCK  # cached tokens read at a time; a multiple of every packing block

_Load = Callable[[jnp.ndarray, int], tuple[jnp.ndarray, jnp.ndarray]]  # (first token, count) -> keys, values


class Partial(NamedTuple):
    """Attention over some of the keys: unnormalised output, running maximum and denominator, per query."""

    acc: Float[Array, "B K Q H"]
    top: Float[Array, "B K Q"]
    total: Float[Array, "B K Q"]


def empty(batch: int, kv_heads: int, queries: int, head_dim: int) -> Partial:
    """Attention over no keys at all."""
    shape = (batch, kv_heads, queries)
    return Partial(
        jnp.zeros((*shape, head_dim), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys (FlashAttention section 3.1)."""
    top = jnp.maximum(a.top, b.top)
    base = jnp.where(jnp.isfinite(top), top, 0.0)
    scale_a, scale_b = jnp.exp(a.top - base), jnp.exp(b.top - base)
    acc = a.acc * scale_a[..., None] + b.acc * scale_b[..., None]
    return Partial(acc, top, a.total * scale_a + b.total * scale_b)


def attend(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    seen: Array,
    scale: float,
) -> Partial:
    """Attention of `Q` queries over `S` keys, where `seen` (broadcastable to `[B, K, Q, S]`) allows it."""
    logits = _logits(q, k, seen, scale)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0)[..., None])
    # A key that no query may see can hold anything, NaN too: its weight is 0, so its value must be finite.
    v = jnp.where(jnp.any(seen, axis=-2)[..., None], v, 0)
    acc = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v, **_EXACT)
    return Partial(acc, top, jnp.sum(weights, axis=-1))


_EXACT = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}


def _logits(q: Array, k: Array, seen: Array, scale: float) -> Array:
    return jnp.where(seen, jnp.einsum("bkqh,bksh->bkqs", q, k, **_EXACT) * scale, -jnp.inf)


def _split(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
    batch, tokens, heads, dim = q.shape
    return q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _join(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    batch, kv_heads, group, tokens, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, kv_heads * group, dim)


def finish(part: Partial, group: int, dtype: jnp.dtype) -> Float[Array, "B T N H"]:
    """Normalises; queries that saw no key give zero."""
    out = part.acc / jnp.where(part.total == 0, 1.0, part.total)[..., None]
    batch, kv_heads, queries, dim = out.shape
    return _join(out.reshape(batch, kv_heads, group, queries // group, dim)).astype(dtype)


class _Blocks(NamedTuple):
    """A prompt cut into blocks of `size` tokens, padded at the end; the first `used` of them hold valid tokens."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    lengths: Int[Array, "B"]
    size: int
    used: Array
    window: int | None

    def queries(self, i: Array) -> Float[Array, "B K Q H"]:
        """Query block `i` of all heads of a group, group-major."""
        q = lax.dynamic_slice_in_dim(self.q, i * self.size, self.size, axis=3)
        batch, kv_heads, _, _, dim = q.shape
        return q.reshape(batch, kv_heads, -1, dim)

    def keys(self, x: Array, j: Array) -> Float[Array, "B K S H"]:
        return lax.dynamic_slice_in_dim(x, j * self.size, self.size, axis=2)

    def seen(self, i: Array, j: Array) -> Array:
        """`[B, 1, Q, S]`: causal, inside the row, inside the window."""
        rows = (i * self.size + jnp.arange(self.size))[:, None]
        columns = j * self.size + jnp.arange(self.size)
        seen = (columns <= rows) & (rows < self.lengths[:, None, None])
        if self.window is not None:
            seen &= columns > rows - self.window
        return jnp.tile(seen, (1, self.q.shape[2], 1))[:, None]

    def first(self, i: Array) -> Array:
        """The first key block that query block `i` can see."""
        return (
            jnp.zeros_like(i) if self.window is None else jnp.maximum(i * self.size - self.window + 1, 0) // self.size
        )


def _blocks(q: Array, k: Array, v: Array, lengths: Array, window: int | None) -> _Blocks:
    tokens = q.shape[1]
    size = min(BLOCK, tokens)
    count = -(-tokens // size)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, count * size - tokens), (0, 0), (0, 0)])  # noqa: E731
    used = (jnp.max(lengths, initial=0) + size - 1) // size
    q, k, v = _split(pad(q), k.shape[2]), pad(k).swapaxes(1, 2), pad(v).swapaxes(1, 2)
    return _Blocks(q, k, v, lengths, size, used, window)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    scale: float,
    window: int | None = None,
) -> Partial:
    """Pass 1: causal attention of right-padded rows, unnormalised, queries group-major (`Q = G * T`)."""
    blocks = _blocks(q, k, v, lengths, window)
    batch, kv_heads, group, padded, dim = blocks.q.shape

    def query_block(i: Array, out: Partial) -> Partial:
        q_i = blocks._replace(q=out.acc).queries(i).astype(q.dtype)

        def key_block(j: Array, part: Partial) -> Partial:
            seen = blocks.seen(i, j)
            return merge(part, attend(q_i, blocks.keys(blocks.k, j), blocks.keys(blocks.v, j), seen, scale))

        part = lax.fori_loop(blocks.first(i), i + 1, key_block, empty(batch, kv_heads, q_i.shape[2], dim))

        def put(whole, x):
            return lax.dynamic_update_slice_in_dim(
                whole, x.reshape(batch, kv_heads, group, blocks.size, *x.shape[3:]), i * blocks.size, axis=3
            )

        return Partial(*map(put, out, part))

    shape = (batch, kv_heads, group, padded)
    # Outputs take the queries' place: zeros to begin with would be one constant that XLA copies ahead for every layer.
    out = Partial(blocks.q.astype(jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    out = lax.fori_loop(0, blocks.used, query_block, out)
    out = out._replace(acc=jnp.where(out.total[..., None] > 0, out.acc, 0.0))
    tokens = q.shape[1]
    return Partial(*(x[:, :, :, :tokens].reshape(batch, kv_heads, group * tokens, *x.shape[4:]) for x in out))


def column_sums(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    part: Partial,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B K T"]:
    """Pass 2: sums the softmax map over its queries, recomputing it block by block from pass 1's log-sum-exp."""
    blocks = _blocks(q, k, k, lengths, window)
    batch, kv_heads, group, padded, _ = blocks.q.shape
    tokens = q.shape[1]
    # +inf where a query saw nothing, so that exp(logit - lse) is 0 there.
    lse = jnp.where(part.total > 0, part.top + jnp.log(jnp.where(part.total > 0, part.total, 1.0)), jnp.inf)
    lse = lse.reshape(batch, kv_heads, group, tokens)
    lse = jnp.pad(lse, [(0, 0)] * 3 + [(0, padded - tokens)], constant_values=jnp.inf)

    def query_block(i: Array, sums: Array) -> Array:
        q_i = blocks.queries(i)
        lse_i = lax.dynamic_slice_in_dim(lse, i * blocks.size, blocks.size, axis=3).reshape(batch, kv_heads, -1, 1)

        def key_block(j: Array, sums: Array) -> Array:
            logits = _logits(q_i, blocks.keys(blocks.k, j), blocks.seen(i, j), scale)
            new = jnp.sum(jnp.exp(logits - lse_i), axis=2)
            old = lax.dynamic_slice_in_dim(sums, j * blocks.size, blocks.size, axis=2)
            return lax.dynamic_update_slice_in_dim(sums, old + new, j * blocks.size, axis=2)

        return lax.fori_loop(blocks.first(i), i + 1, key_block, sums)

    sums = lax.fori_loop(0, blocks.used, query_block, jnp.zeros((batch, kv_heads, padded), jnp.float32))
    return sums[:, :, :tokens]


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None,
    with_scores: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T"] | None]:
    """See `attention.prefill_attention`."""
    part = causal_attention(q, k, v, lengths, scale, window)
    out = finish(part, q.shape[2] // k.shape[2], q.dtype)
    return out, column_sums(q, k, lengths, part, scale, window) if with_scores else None


def attend_cache(q: Float[Array, "B T N H"], layer: LayerCache, positions: Int[Array, "B T"], scale: float) -> Partial:
    """Attention of new queries over everything in a layer's cache, queries group-major (`Q = G * T`).

    `positions` are the queries' own; they matter only under a sliding window.
    """
    grouped = _split(q, layer.tail_k.shape[1])
    batch, kv_heads, group, _, dim = grouped.shape
    q = grouped.reshape(batch, kv_heads, -1, dim)
    oldest = None
    if layer.window is not None:
        oldest = jnp.tile(positions - layer.window, (1, group))[:, None, :, None]  # seen keys lie after it

    def region(part: Partial, load: _Load, capacity: int, length: Array, key_positions: Array | None) -> Partial:
        """Adds a region's tokens block by block, reading no block past the longest row."""
        size = min(DECODE_BLOCK, capacity)

        def block(i: Array | int, part: Partial) -> Partial:
            # The last block is moved back to end with the region; what it repeats is masked.
            first = jnp.minimum(i * size, capacity - size)
            slots = first + jnp.arange(size)
            seen = ((slots >= i * size) & (slots < length[:, None]))[:, None, None]  # [B, 1, 1, S]
            if oldest is not None and key_positions is not None:
                seen &= lax.dynamic_slice_in_dim(key_positions, first, size, axis=2)[:, :, None] > oldest
            return merge(part, attend(q, *load(first, size), seen, scale))

        if size == capacity:
            return block(0, part)
        return lax.fori_loop(0, (jnp.max(length) + size - 1) // size, block, part)

    def tail(first: Array, size: int) -> tuple[Array, Array]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=2)
        return cut(layer.tail_k), cut(layer.tail_v)

    def packed(first: Array, size: int) -> tuple[Array, Array]:
        return layer.packed_tokens(first, size, q.dtype)

    part = empty(batch, kv_heads, q.shape[2], dim)
    part = region(part, tail, layer.tail_capacity, layer.tail_length, layer.tail_positions)
    if layer.k is not None:
        part = region(part, packed, layer.packed_capacity, layer.packed_length, layer.packed_positions)
    return part


def decode_attention(
    q: Float[Array, "B N H"], layer: LayerCache, positions: Int[Array, "B"], *, scale: float
) -> Float[Array, "B N H"]:
    """See `attention.decode_attention`."""
    part = attend_cache(q[:, None], layer, positions[:, None], scale)
    return finish(part, q.shape[1] // layer.tail_k.shape[1], q.dtype)[:, 0]


def decode_attention_weights(
    q: Float[Array, "B N H"], layer: LayerCache, *, scale: float
) -> tuple[Float[Array, "B N H"], Float[Array, "B K C"]]:
    """See `attention.decode_attention_weights`."""
    kv_heads = layer.tail_k.shape[1]
    part = attend_cache(q[:, None], layer, jnp.zeros((q.shape[0], 1), jnp.int32), scale)
    seen = (jnp.arange(layer.tail_capacity) < layer.tail_length[:, None])[:, None, None]  # [B, 1, 1, C]
    logits = _logits(_split(q[:, None], kv_heads)[:, :, :, 0], layer.tail_k, seen, scale)
    top, total = (jnp.where(part.total > 0, x, 1.0)[..., None] for x in (part.top, part.total))
    weights = jnp.sum(jnp.exp(logits - top) / total, axis=2)
    return finish(part, q.shape[1] // kv_heads, q.dtype)[:, 0], weights


def extend_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: LayerCache,
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """See `attention.extend_attention`."""
    new = causal_attention(q, k, v, lengths, scale, layer.window)
    part = merge(attend_cache(q, layer, positions, scale), new)
    out = finish(part, q.shape[2] // k.shape[2], q.dtype)
    valid = jnp.arange(q.shape[1]) < lengths[:, None]
    return jnp.where(valid[..., None, None], out, 0)
