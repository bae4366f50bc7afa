"""Causal attention over a prompt, with the column sums of its softmax map if asked for.

Two passes: flash attention (here), which keeps each query's log-sum-exp in float32, then the column sums
(`column_sums.py`). A thread block owns 128 queries of one head. Its two compute warpgroups take 64 each and alternate
on the tensor cores: one multiplies while the other is in its softmax. The third warpgroup streams tiles of keys and
values through a ring.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.column_sums import column_sums

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
BLOCK_Q = 64  # queries of a warpgroup
BLOCK = BLOCK_Q * hopper.COMPUTE_WARPGROUPS
_LOG2E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)

_ROWS = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of the first pass: never changes the meaning.

    Attributes:
      block_kv: keys of a tile, a multiple of 64.
      stages: tiles of keys, and of values, in flight.
    """

    block_kv: int = 128
    stages: int = 2

    def __post_init__(self) -> None:
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv={self.block_kv}: expected 64 or 128")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2")


def heuristic_config(head_dim: int) -> Config:
    """What is tested on an H100."""
    return Config(stages=2 if head_dim == 128 else 4)


def scratch(config: Config, head_dim: int, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    warpgroups, stages = hopper.COMPUTE_WARPGROUPS, config.stages
    ring = hopper.operand(stages, config.block_kv, head_dim, dtype=dtype)
    return {
        "q_smem": hopper.operand(warpgroups, BLOCK_Q, head_dim, dtype=dtype),  # later the output
        "k_smem": ring,
        "v_smem": ring,
        "lse_smem": plgpu.SMEM((warpgroups, BLOCK_Q), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=warpgroups),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "v_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=warpgroups),
    }


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    with_scores: bool,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal attention over right-padded rows, as `docs/architecture.md` defines it.

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16, H 64 or 128.
      k, v: `[B, T, K, H]`, q's dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; what lies beyond may be anything, NaN too.
      scale: of the logits, positive.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the column sums of the softmax map over the row's queries and the heads of a KV head.
      config: tuning of the first pass.

    Returns:
      `out [B, T, N, H]` in q's dtype and `scores [B, K, T]` in float32 or None, both zero in the padding.

    Raises:
      ValueError: for shapes or dtypes that do not belong together, or a config that does not fit the device.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    check(q, k, v, lengths, scale=scale, window=window)
    reason = hopper.why_unavailable()
    if reason:
        raise NotImplementedError(reason)
    return _prefill_attention(q, k, v, lengths, scale, window, with_scores, config or heuristic_config(q.shape[3]))


def check(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, window: int | None = None
) -> None:
    """Refuses what the kernels do not cover; looks at shapes and dtypes alone.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes that do not belong together.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, H] and twice [B, T, K, H]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} KV heads: expected a multiple")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}: expected {q.shape[:1]}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: expected the same")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1")
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"q.dtype={q.dtype}: the Pallas prefill kernel supports {' and '.join(DTYPES)}")
    if q.shape[3] not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={q.shape[3]}: the Pallas prefill kernel supports 64 and 128")
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: the Pallas prefill kernel supports positive scales")


def _prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    with_scores: bool,
    config: Config,
) -> tuple[jax.Array, jax.Array | None]:
    tokens = q.shape[1]
    q, k, v = (jnp.pad(x, [(0, 0), (0, -tokens % BLOCK), (0, 0), (0, 0)]) for x in (q, k, v))
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, tokens)
    if window is not None and window >= tokens:
        window = None
    out, lse = flash_attention(q, k, v, lengths, scale=scale, window=window, config=config)
    scores = None
    if with_scores:
        scores = column_sums(q, k, lse, lengths, scale=scale, window=window)[:, :, :tokens]
    return out[:, :tokens], scores


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Pass 1: the output and the log-sum-exp `[B, N, T]`, in units of log 2 and infinite in the padding.

    `T` is a multiple of `BLOCK`.
    """
    batch, tokens, heads, head_dim = q.shape
    group = heads // k.shape[2]
    block_kv, stages = config.block_kv, config.stages
    arrays = scratch(config, head_dim, q.dtype)
    hopper.check_shared_memory(arrays, config)
    logit_scale = scale * _LOG2E

    def kernel(
        lengths_gmem,
        q_gmem,
        k_gmem,
        v_gmem,
        v_edge_gmem,
        out_gmem,
        lse_gmem,
        *,
        q_smem,
        k_smem,
        v_smem,
        lse_smem,
        q_ready,
        k_ready,
        v_ready,
        k_consumed,
        v_consumed,
        turn,
    ):
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        # The last queries have the most keys: they go first.
        first_query = (tokens // BLOCK - 1 - lax.axis_index("q_tile")) * BLOCK
        length = lengths_gmem[b]
        first = jnp.int32(0)
        if window is not None:
            first = lax.div(jnp.maximum(first_query - (window - 1), 0), jnp.int32(block_kv))
        last = jnp.where(first_query < length, lax.div(first_query + BLOCK, jnp.int32(block_kv)), first)
        wg = lax.axis_index("warpgroup")

        @pl.when(wg < hopper.COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            start = first_query + wg * BLOCK_Q
            tile = pl.ds(start, BLOCK_Q)
            plgpu.copy_gmem_to_smem(q_gmem.at[b, tile, head], q_smem.at[wg], q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def mask(logits, step):
                rows = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + start
                columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
                columns += step * block_kv
                seen = columns <= rows
                if window is not None:
                    seen &= columns > rows - window
                return jnp.where(seen, logits, -jnp.inf)

            def kv_step(step, carry):
                acc, top, total = carry
                slot = lax.rem(step - first, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply_keys(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem.at[wg], plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
                    take_turns()
                    return acc_ref[...]

                logits = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((BLOCK_Q, block_kv), jnp.float32))
                plgpu.barrier_arrive(k_consumed.at[slot])
                masked = (step + 1) * block_kv > first_query
                if window is not None:
                    masked |= step * block_kv < first_query + BLOCK - window
                logits = lax.cond(masked, lambda x: mask(x, step), lambda x: x, logits)

                new_top = jnp.maximum(top, logits.max(axis=1) * logit_scale)
                correction = jnp.exp2(top - new_top)
                weights = jnp.exp2(logits * logit_scale - lax.broadcast_in_dim(new_top, logits.shape, [0]))
                acc *= lax.broadcast_in_dim(correction, acc.shape, [0])
                total = total * correction + weights.sum(axis=1)
                # The softmax is to be over before the other warpgroup's begins.
                acc, total, new_top, operand = lax.optimization_barrier((acc, total, new_top, weights.astype(q.dtype)))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, operand, v_smem.at[slot]))(
                    plgpu.WGMMAAccumulatorRef.init(acc)
                )
                plgpu.barrier_arrive(v_consumed.at[slot])
                return acc, new_top, total

            acc = plgpu.layout_cast(jnp.zeros((BLOCK_Q, head_dim), jnp.float32), plgpu.Layout.WGMMA)
            # Finite, so that a row that has seen nothing yet makes no NaN.
            top = plgpu.layout_cast(jnp.full((BLOCK_Q,), _LOWEST, jnp.float32), _ROWS)
            total = plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), _ROWS)
            pl.when(wg == 1)(take_turns)
            acc, top, total = lax.fori_loop(first, last, kv_step, (acc, top, total))
            pl.when(wg == 0)(take_turns)

            valid = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q,), 0, layout=_ROWS) + start < length
            lse_smem[wg] = jnp.where(valid, top + jnp.log2(total), jnp.inf)
            out = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
            out = jnp.where(lax.broadcast_in_dim(valid, acc.shape, [0]), out, 0.0)
            q_smem[wg] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out_gmem.at[b, tile, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_gmem.at[b, head, tile])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == hopper.COMPUTE_WARPGROUPS)
        def copy():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            @pl.loop(first, last)
            def _(step):
                slot = lax.rem(step - first, jnp.int32(stages))
                tile = pl.ds(step * block_kv, block_kv)
                refill = step - first >= stages
                pl.when(refill)(lambda: plgpu.barrier_wait(k_consumed.at[slot]))
                plgpu.copy_gmem_to_smem(k_gmem.at[b, tile, kv_head], k_smem.at[slot], k_ready.at[slot])
                pl.when(refill)(lambda: plgpu.barrier_wait(v_consumed.at[slot]))
                ends_here = (step + 1) * block_kv > length

                @pl.when(ends_here)
                def _():
                    tile = pl.ds(step * block_kv - lax.div(length, jnp.int32(BLOCK)) * BLOCK, block_kv)
                    plgpu.copy_gmem_to_smem(v_edge_gmem.at[b, tile, kv_head], v_smem.at[slot], v_ready.at[slot])

                @pl.when(~ends_here)
                def _():
                    plgpu.copy_gmem_to_smem(v_gmem.at[b, tile, kv_head], v_smem.at[slot], v_ready.at[slot])

    outs = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32))
    grid = {"head": heads, "batch": batch, "q_tile": tokens // BLOCK}
    return hopper.launch(kernel, outs, arrays, grid)(lengths, q, k, v, _edge(v, lengths))


def _edge(v: jax.Array, lengths: jax.Array) -> jax.Array:
    """`[B, BLOCK, K, H]`: the tile in which each row ends, zero in the padding.

    A weight of 0 does not undo a value of NaN, so the products read this tile in place of `v`'s own.
    """

    def cut(v: jax.Array, length: jax.Array) -> jax.Array:
        start = length // BLOCK * BLOCK
        tile = lax.dynamic_slice_in_dim(v, jnp.minimum(start, v.shape[0] - BLOCK), BLOCK)
        return jnp.where(jnp.arange(BLOCK)[:, None, None] < length - start, tile, 0)

    return jax.vmap(cut)(v, lengths)
