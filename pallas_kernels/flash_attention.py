"""Flash attention over a prompt that keeps the log-sum-exp of each query's logits in float32.

A thread block owns 128 queries of one head. Its two compute warpgroups take 64 each and alternate on the tensor cores:
one multiplies while the other is in its softmax. The third warpgroup streams tiles of keys and values through a ring.
Only tiles at an edge (the diagonal, the window's) are masked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, tuning

BLOCK_Q = 64  # queries per warpgroup
BLOCK = BLOCK_Q * hopper.COMPUTE_WARPGROUPS
_LOG2E = math.log2(math.e)
_BITS_OF_THREE_QUARTERS = 0x3F400000  # 0.75 as float32
_LOWEST_FLOAT32 = float(jnp.finfo(jnp.float32).min)

_ROWS = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tuning.Config):
    """Tuning of the first pass.

    Attributes:
      block_kv: keys per tile.
      stages: tiles of keys, and of values, in flight.
    """

    block_kv: int = tuning.choice(64, 128, default=128)
    stages: int = tuning.choice(2, 3, 4, default=2)


def heuristic_config(head_dim: int) -> Config:
    """The config for a kind of device without a record."""
    return Config(stages=2 if head_dim == 128 else 4)


def default_config(head_dim: int) -> Config:
    """The winner recorded for this kind of device, else the heuristic."""
    return tuning.winner("flash_attention", Config, head_dim=head_dim) or heuristic_config(head_dim)


def scratch(config: Config, head_dim: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    warpgroups, stages = hopper.COMPUTE_WARPGROUPS, config.stages
    ring = hopper.operand(stages, config.block_kv, head_dim, dtype=dtype)
    return {
        "q_smem": hopper.operand(warpgroups, BLOCK_Q, head_dim, dtype=dtype),  # later the output
        "k_smem": ring,
        "v_smem": ring,
        "q_ready": plgpu.Barrier(num_barriers=warpgroups),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "v_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=warpgroups),
    }


@functools.partial(jax.jit, static_argnames=("scale", "window", "config"))  # lowered once for all layers of a model
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
    """Pass 1: attention, and the log-sum-exp of each query for the column sums.

    Args:
      q, k, v, lengths, scale, window: as in `prefill_attention`; `T` is a multiple of `BLOCK`.
      config: tuning.

    Returns:
      `out [B, T, N, H]` in q's dtype, zero in the padding, and the log-sum-exp of each query's scaled logits, float32
      `[B, N, T]` in units of log 2, infinite in the padding.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    head_bytes = (k.nbytes + v.nbytes) // (batch * kv_heads)
    section = group * hopper.streams_per_section(batch * kv_heads, head_bytes)  # heads whose blocks start side by side
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
        shared,
    ):
        row_head = lax.axis_index("section") * section + lax.axis_index("member")
        b, head = lax.div(row_head, jnp.int32(heads)), lax.rem(row_head, jnp.int32(heads))
        # The last queries go first, because they have the most keys.
        first_query = (tokens // BLOCK - 1 - lax.axis_index("q_tile")) * BLOCK
        length = lengths_gmem[b]
        # Tiles of keys run from `first` to `last`. In those from `inner` to `diagonal`, all queries see all keys.
        first = inner = jnp.int32(0)
        diagonal = lax.div(first_query, jnp.int32(block_kv))
        if window is not None:
            first = lax.div(jnp.maximum(first_query - (window - 1), 0), jnp.int32(block_kv))
            seen_by_all = jnp.maximum(first_query + (BLOCK - window), 0)
            inner = jnp.minimum(lax.div(seen_by_all + (block_kv - 1), jnp.int32(block_kv)), diagonal)
        last = lax.div(first_query + BLOCK, jnp.int32(block_kv))
        first, inner, diagonal, last = (jnp.where(first_query < length, x, 0) for x in (first, inner, diagonal, last))
        wg = lax.axis_index("warpgroup")

        @pl.when(wg < hopper.COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            start = first_query + wg * BLOCK_Q
            tile = pl.ds(start, BLOCK_Q)
            plgpu.copy_gmem_to_smem(q_gmem.at[b, tile, head], shared.q_smem.at[wg], shared.q_ready.at[wg])
            plgpu.barrier_wait(shared.q_ready.at[wg])
            # In registers, so that products leave shared memory to the keys.
            queries = plgpu.layout_cast(shared.q_smem[wg], plgpu.Layout.WGMMA)

            def slot_of(step):
                return lax.rem(step - first, jnp.int32(stages))

            def wait_for_keys(step):
                pl.when(step < last)(lambda: plgpu.barrier_wait(shared.k_ready.at[slot_of(step)]))

            def take_turns():
                plgpu.barrier_arrive(shared.turn)
                plgpu.barrier_wait(shared.turn)

            def mask(logits, step):
                rows = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + start
                columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
                columns += step * block_kv
                seen = columns <= rows
                if window is not None:
                    seen &= columns > rows - window
                return jnp.where(seen, logits, -jnp.inf)

            def kv_step(masked, step, carry):
                acc, top, total = carry
                slot = slot_of(step)

                def multiply_keys(acc_ref):
                    plgpu.wgmma(acc_ref, queries, shared.k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return acc_ref[...]

                logits = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((BLOCK_Q, block_kv), jnp.float32))
                plgpu.barrier_arrive(shared.k_consumed.at[slot])
                if masked:
                    logits = mask(logits, step)
                new_top = jnp.maximum(top, logits.max(axis=1) * logit_scale)
                correction = jnp.exp2(top - new_top)
                weights = jnp.exp2(logits * logit_scale - lax.broadcast_in_dim(new_top, logits.shape, [0]))
                acc *= lax.broadcast_in_dim(correction, acc.shape, [0])
                total = total * correction + weights.sum(axis=1)
                # The softmax must end before the other warpgroup's begins.
                acc, total, new_top, operand = lax.optimization_barrier((acc, total, new_top, weights.astype(q.dtype)))
                plgpu.barrier_arrive(shared.turn)
                plgpu.barrier_wait(shared.v_ready.at[slot])
                plgpu.barrier_wait(shared.turn)

                def multiply_values(acc_ref):
                    plgpu.wgmma(acc_ref, operand, shared.v_smem.at[slot])
                    wait_for_keys(step + 1)

                acc = pl.run_state(multiply_values)(plgpu.WGMMAAccumulatorRef.init(acc))
                plgpu.barrier_arrive(shared.v_consumed.at[slot])
                return acc, new_top, total

            acc = plgpu.layout_cast(jnp.zeros((BLOCK_Q, head_dim), jnp.float32), plgpu.Layout.WGMMA)
            # Finite, because a row that has seen no key would make NaN otherwise.
            top = plgpu.layout_cast(jnp.full((BLOCK_Q,), _LOWEST_FLOAT32, jnp.float32), _ROWS)
            total = plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), _ROWS)
            wait_for_keys(first)
            pl.when(wg == 1)(take_turns)
            carry = acc, top, total
            if window is not None:
                carry = lax.fori_loop(first, inner, functools.partial(kv_step, True), carry)
            carry = lax.fori_loop(inner, diagonal, functools.partial(kv_step, False), carry)
            acc, top, total = lax.fori_loop(diagonal, last, functools.partial(kv_step, True), carry)
            pl.when(wg == 0)(take_turns)

            valid = plgpu.broadcasted_iota(jnp.int32, (BLOCK_Q,), 0, layout=_ROWS) + start < length
            lse_gmem[b, head, tile] = jnp.where(valid, top + log2(total), jnp.inf)
            out = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
            out = jnp.where(lax.broadcast_in_dim(valid, acc.shape, [0]), out, 0.0)
            shared.q_smem[wg] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.q_smem.at[wg], out_gmem.at[b, tile, head])
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
                pl.when(refill)(lambda: plgpu.barrier_wait(shared.k_consumed.at[slot]))
                plgpu.copy_gmem_to_smem(k_gmem.at[b, tile, kv_head], shared.k_smem.at[slot], shared.k_ready.at[slot])
                pl.when(refill)(lambda: plgpu.barrier_wait(shared.v_consumed.at[slot]))
                ends_here = (step + 1) * block_kv > length

                @pl.when(ends_here)
                def _():
                    tile = pl.ds(step * block_kv - lax.div(length, jnp.int32(BLOCK)) * BLOCK, block_kv)
                    plgpu.copy_gmem_to_smem(
                        v_edge_gmem.at[b, tile, kv_head], shared.v_smem.at[slot], shared.v_ready.at[slot]
                    )

                @pl.when(~ends_here)
                def _():
                    plgpu.copy_gmem_to_smem(
                        v_gmem.at[b, tile, kv_head], shared.v_smem.at[slot], shared.v_ready.at[slot]
                    )

    outs = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32))
    grid = {"section": batch * heads // section, "q_tile": tokens // BLOCK, "member": section}
    return hopper.launch(kernel, outs, arrays, grid)(lengths, q, k, v, _edge(v, lengths))


def log2(x: jax.Array) -> jax.Array:
    """Base-2 logarithm of a positive x, within 1.5 units in the last place of float32.

    The hardware's error is proportional to the logarithm and nearly equal for many queries, so the errors of their
    weights would add up.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits - _BITS_OF_THREE_QUARTERS) >> 23
    mantissa = lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32)  # from 3/4 to 3/2
    z = (mantissa - 1) / (mantissa + 1)
    series = 1 / 9
    for divisor in (7, 5, 3, 1):
        series = series * (z * z) + 1 / divisor
    return exponent.astype(jnp.float32) + (2 * _LOG2E) * z * series


def _edge(v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Last tile of values of each row, `[B, BLOCK, K, H]`, zero in the padding.

    The products read this tile instead of `v`'s own, because a weight of 0 times NaN is NaN.
    """

    def cut(v: jax.Array, length: jax.Array) -> jax.Array:
        start = length // BLOCK * BLOCK
        tile = lax.dynamic_slice_in_dim(v, jnp.minimum(start, v.shape[0] - BLOCK), BLOCK)
        return jnp.where(jnp.arange(BLOCK)[:, None, None] < length - start, tile, 0)

    return jax.vmap(cut)(v, lengths)
