"""Prefill attention: causal attention over a prompt and, if asked for, the score of each key (MiniKV section 3.4).

Shapes use one legend throughout the project: `B` batch, `T` queries, `S` keys, `N` query heads, `K` KV heads,
`G = N / K` query heads per KV head, `H` head dim; query head `n` reads KV head `n // G`. Rows are right-padded; RoPE is
applied.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax.meshes import heads_at
from minikv_jax.models import windows
from minikv_jax.models.windows import Window
from minikv_jax.ops import dispatch
from minikv_jax.ops.online_softmax import Partial, attend, empty, finish, logits, merge, merge_sinks, split_heads
from minikv_jax.ops.shapes import Scaling, prompt_contract, refuse_sinks, scaling

BLOCK = 256  # tokens per block in plain JAX

Scored = tuple[Float[Array, "B T N H"], Float[Array, "B K T"] | None]


@jax.named_scope("prefill_attention")
def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: Window | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    with_scores: bool = False,
    implementation: str | None = None,
) -> Scored:
    """Runs causal attention over a prompt and, if asked for, sums the columns of its softmax map (MiniKV section 3.4).

    Args:
      q, k, v: queries, keys and values after RoPE, right-padded; float32, bfloat16 or float16.
      lengths: valid tokens per row, in `0..T`. The padding may hold anything, including NaN.
      scale: factor of the logits, positive; `H ** -0.5` by default.
      soft_cap: logits `x` become `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118); by default they stay.
        Only "xla" computes it.
      window: sliding window in tokens: query `t` sees the keys `t - window < s <= t`; or a `Chunk`, which only "xla"
        computes. By default it sees all `s <= t`.
      sink_logits: a learnt logit per query head, which enlarges the softmax's denominator like one more key whose value
        is zero (attention sinks of gpt-oss); none by default. Computed by "xla" only.
      with_scores: whether to return the sums of the softmax map over the row's queries and the `G` query heads of each
        KV head. Memory stays linear in `T`.
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU that supports the inputs.

    Returns:
      The output in `q`'s dtype, and the float32 scores or None. Both are zero in the padding.

    Raises:
      ValueError: an array of another shape or dtype, a length out of range, a scale or window that is not positive.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    q, k, v, lengths, sinks = prompt_contract("prefill_attention", q, k, v, lengths, sink_logits)
    windows.check(window)
    checks.flag("with_scores", with_scores)
    batch, tokens, heads, head_dim = q.shape
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": k.shape[2], "head_dim": head_dim}
    arguments = (q, k, v, lengths, sinks, scaling(scale, soft_cap, head_dim), window, with_scores)
    return dispatch.run(
        "prefill_attention",
        implementation,
        sizes,
        _IMPLEMENTATIONS,
        *arguments,
        heads=(2, 2, 2, None, 1),
        outputs=(heads_at(2), heads_at(1)),
    )


def _xla(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    sinks: Array | None,
    scale: Scaling,
    window: Window | None,
    with_scores: bool,
) -> Scored:
    part = merge_sinks(causal_attention(q, k, v, lengths, scale, window), sinks)
    out = finish(part, q.shape[2] // k.shape[2], q.dtype)
    return out, column_sums(q, k, lengths, part, scale, window) if with_scores else None


class _Blocks(NamedTuple):
    """A prompt cut into blocks of `size` tokens, padded at the end; the first `used` of them hold valid tokens."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    lengths: Int[Array, "B"]
    size: int
    used: Array
    window: Window | None
    start: Array | int  # position of the first token, which counts for chunks

    def keys(self, x: Array, j: Array) -> Float[Array, "B K S H"]:
        """Block `j` of keys or values."""
        return lax.dynamic_slice_in_dim(x, j * self.size, self.size, axis=2)

    def seen(self, i: Array, j: Array) -> Array:
        """Mask `[B, 1, Q, S]` of the keys that are causal, inside the row and inside the window."""
        rows = (i * self.size + jnp.arange(self.size))[:, None]
        columns = j * self.size + jnp.arange(self.size)
        seen = (columns <= rows) & (rows < self.lengths[:, None, None])
        if self.window is not None:
            seen &= columns + self.start >= windows.oldest(self.window, rows + self.start)
        return jnp.tile(seen, (1, self.q.shape[2], 1))[:, None]

    def first(self, i: Array) -> Array:
        """First key block that query block `i` can see."""
        if self.window is None:
            return jnp.zeros_like(i)
        return jnp.maximum(i * self.size - windows.size(self.window) + 1, 0) // self.size


def _query_block(q: Float[Array, "B K G T H"], i: Array, size: int) -> Float[Array, "B K Q H"]:
    """Cuts out block `i` of the queries of all heads of a group, group-major."""
    q = lax.dynamic_slice_in_dim(q, i * size, size, axis=3)
    batch, kv_heads, _, _, dim = q.shape
    return q.reshape(batch, kv_heads, -1, dim)


def _blocks(q: Array, k: Array, v: Array, lengths: Array, window: Window | None, start: Array | int = 0) -> _Blocks:
    tokens = q.shape[1]
    size = min(BLOCK, tokens)
    count = -(-tokens // size)
    q, k, v = (jnp.pad(x, [(0, 0), (0, count * size - tokens), (0, 0), (0, 0)]) for x in (q, k, v))
    used = (jnp.max(lengths, initial=0) + size - 1) // size
    q, k, v = split_heads(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    return _Blocks(q, k, v, lengths, size, used, window, start)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    scale: Scaling,
    window: Window | None = None,
    start: Array | int = 0,
) -> Partial:
    """Pass 1: unnormalised causal attention of right-padded rows, queries group-major (`Q = G * T`).

    `start` is the position of the first token, `[B, 1, 1]`, which says where chunks end.
    """
    blocks = _blocks(q, k, v, lengths, window, start)
    batch, kv_heads, group, padded, dim = blocks.q.shape

    def query_block(i: Array, state: Partial) -> Partial:
        q_i = _query_block(state.acc, i, blocks.size).astype(q.dtype)

        def key_block(j: Array, part: Partial) -> Partial:
            seen = blocks.seen(i, j)
            return merge(part, attend(q_i, blocks.keys(blocks.k, j), blocks.keys(blocks.v, j), seen, scale))

        part = lax.fori_loop(blocks.first(i), i + 1, key_block, empty(batch, kv_heads, q_i.shape[2], dim))

        def put(x: Array, block: Array) -> Array:
            block = block.reshape(batch, kv_heads, group, blocks.size, *block.shape[3:])
            return lax.dynamic_update_slice_in_dim(x, block, i * blocks.size, axis=3)

        return Partial(*map(put, state, part))

    shape = (batch, kv_heads, group, padded)
    # `acc` starts as the queries, which the output replaces block by block. If it started as zeros, XLA would copy that
    # constant ahead of time for every layer.
    queries = blocks.q.astype(jnp.float32)
    state = Partial(queries, jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    state = lax.fori_loop(0, blocks.used, query_block, state)
    state = state._replace(acc=jnp.where(state.total[..., None] > 0, state.acc, 0.0))
    tokens = q.shape[1]
    return Partial(*(x[:, :, :, :tokens].reshape(batch, kv_heads, group * tokens, *x.shape[4:]) for x in state))


def column_sums(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    part: Partial,
    scale: Scaling,
    window: Window | None = None,
) -> Float[Array, "B K T"]:
    """Pass 2: sums the softmax map over its queries, recomputing it block by block from pass 1's log-sum-exp."""
    blocks = _blocks(q, k, k, lengths, window)
    batch, kv_heads, group, padded, _ = blocks.q.shape
    tokens = q.shape[1]
    # +inf if a query saw nothing, so that exp(logit - lse) is 0 there.
    lse = jnp.where(part.total > 0, part.top + jnp.log(jnp.where(part.total > 0, part.total, 1.0)), jnp.inf)
    lse = lse.reshape(batch, kv_heads, group, tokens)
    lse = jnp.pad(lse, [(0, 0)] * 3 + [(0, padded - tokens)], constant_values=jnp.inf)

    def query_block(i: Array, sums: Array) -> Array:
        q_i = _query_block(blocks.q, i, blocks.size)
        lse_i = lax.dynamic_slice_in_dim(lse, i * blocks.size, blocks.size, axis=3).reshape(batch, kv_heads, -1, 1)

        def key_block(j: Array, sums: Array) -> Array:
            block = logits(q_i, blocks.keys(blocks.k, j), blocks.seen(i, j), scale)
            new = jnp.sum(jnp.exp(block - lse_i), axis=2)
            old = lax.dynamic_slice_in_dim(sums, j * blocks.size, blocks.size, axis=2)
            return lax.dynamic_update_slice_in_dim(sums, old + new, j * blocks.size, axis=2)

        return lax.fori_loop(blocks.first(i), i + 1, key_block, sums)

    sums = lax.fori_loop(0, blocks.used, query_block, jnp.zeros((batch, kv_heads, padded), jnp.float32))
    return sums[:, :, :tokens]


def _kernel(
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    sinks: Array | None,
    scale: Scaling,
    window: Window | None,
    scores: bool,
) -> Scored:
    refuse_sinks("prefill_attention", implementation, sinks)
    factor = scale.without_soft_cap("prefill_attention", implementation)
    kernel = dispatch.package(implementation).prefill_attention
    return kernel(q, k, v, lengths, scale=factor, window=windows.for_kernels(window), with_scores=scores)


_IMPLEMENTATIONS = {
    "xla": _xla,
    "pallas": functools.partial(_kernel, "pallas"),
    "cuda": functools.partial(_kernel, "cuda"),
}
