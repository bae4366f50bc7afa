"""Column sums of a causal softmax map, recomputed block by block from the log-sum-exp of its rows.

A thread block owns 128 keys of one KV head, 64 a warpgroup, which stay in registers as the left operand: logits come
out transposed, a key's weights lie in one row, and summing them needs no other warp. Queries of all heads of the group
stream through a ring, from the keys' own tile to the row's end. Each warpgroup starts the product of the next tile
before it exponentiates the present one. Every sum has one owner and one order, so equal runs are bit-equal.
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

BLOCK_K = 64  # keys of a warpgroup
BLOCK = BLOCK_K * hopper.COMPUTE_WARPGROUPS
_LOG2E = math.log2(math.e)

_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning only: never changes the meaning.

    Attributes:
      block_q: queries of a tile.
      stages: tiles of queries in flight.
    """

    block_q: int = 128
    stages: int = 4

    def __post_init__(self) -> None:
        if self.block_q not in (64, 128):
            raise ValueError(f"block_q={self.block_q}: expected 64 or 128")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2")


def heuristic_config(head_dim: int) -> Config:
    """What is tested on an H100."""
    return Config()


def scratch(config: Config, head_dim: int, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    warpgroups, stages = hopper.COMPUTE_WARPGROUPS, config.stages
    return {
        "k_smem": hopper.operand(warpgroups, BLOCK_K, head_dim, dtype=dtype),
        "q_smem": hopper.operand(stages, config.block_q, head_dim, dtype=dtype),
        "lse_smem": plgpu.SMEM((stages, config.block_q), jnp.float32),
        "sums_smem": plgpu.SMEM((warpgroups, BLOCK_K), jnp.float32),
        "k_ready": plgpu.Barrier(num_barriers=warpgroups),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "q_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    config: Config | None = None,
) -> jax.Array:
    """Pass 2: what each key gets from its row's queries and the heads of its KV head, float32 `[B, K, T]`.

    Args:
      q, k: as in `prefill_attention`; `T` is a multiple of `BLOCK`.
      lse: float32 `[B, N, T]`, log-sum-exp of each query's scaled logits, in units of log 2.
      lengths: int32 `[B]`.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    config = config or heuristic_config(head_dim)
    block_q, stages = config.block_q, config.stages
    arrays = scratch(config, head_dim, q.dtype)
    hopper.check_shared_memory(arrays, config)
    logit_scale = scale * _LOG2E

    def kernel(
        lengths_gmem,
        q_gmem,
        k_gmem,
        lse_gmem,
        sums_gmem,
        *,
        k_smem,
        q_smem,
        lse_smem,
        sums_smem,
        k_ready,
        q_ready,
        q_consumed,
    ):
        b, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
        first_key = lax.axis_index("k_tile") * BLOCK
        length = lengths_gmem[b]
        end = length if window is None else jnp.minimum(length, first_key + BLOCK - 1 + window)
        # Query tiles of one head; all heads' tiles make one sequence of steps.
        tiles = jnp.maximum(lax.div(end - first_key + (block_q - 1), jnp.int32(block_q)), 0)
        steps = jnp.where(first_key < length, tiles * group, 0)
        wg = lax.axis_index("warpgroup")

        def query_tile(step):
            return first_key + lax.rem(step, tiles) * block_q

        @pl.when(wg < hopper.COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            start = first_key + wg * BLOCK_K
            tile = pl.ds(start, BLOCK_K)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, tile, kv_head], k_smem.at[wg], k_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[wg])
            keys = plgpu.load(k_smem.at[wg], (), layout=plgpu.Layout.WGMMA)

            def mask(logits, step):
                rows = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA) + start
                columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
                columns += query_tile(step)
                seen = (columns >= rows) & (columns < length)
                if window is not None:
                    seen &= columns < rows + window
                return jnp.where(seen, logits, -jnp.inf)

            def multiply(acc_ref, step):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.wgmma(acc_ref, keys, plgpu.transpose_ref(q_smem.at[slot], (1, 0)))

            def masked(logits, step):
                query = query_tile(step)
                at_edge = (query < first_key + BLOCK) | (query + block_q > length)
                if window is not None:
                    at_edge |= query + block_q > first_key + window
                return lax.cond(at_edge, lambda x: mask(x, step), lambda x: x, logits)

            def add(logits, sums, step):
                slot = lax.rem(step, jnp.int32(stages))
                lse = plgpu.load(lse_smem.at[slot], (), layout=_COLUMNS)
                plgpu.barrier_arrive(q_consumed.at[slot])
                weights = jnp.exp2(logits * logit_scale - lax.broadcast_in_dim(lse, logits.shape, [1]))
                return sums + weights.sum(axis=1)

            acc_type = plgpu.WGMMAAccumulatorRef((BLOCK_K, block_q), jnp.float32)

            def first_product(acc_ref):
                multiply(acc_ref, 0)
                return acc_ref[...]

            def step_and_next(step, carry):
                logits, sums = carry
                logits = masked(logits, step)

                def overlap(acc_ref):
                    multiply(acc_ref, step + 1)
                    new_sums = add(logits, sums, step)
                    return acc_ref[...], new_sums

                return pl.run_scoped(overlap, acc_type)

            sums_smem[wg] = plgpu.layout_cast(jnp.zeros((BLOCK_K,), jnp.float32), _ROWS)

            @pl.when(steps > 0)
            def _():
                logits = pl.run_scoped(first_product, acc_type)
                sums = plgpu.layout_cast(jnp.zeros((BLOCK_K,), jnp.float32), _ROWS)
                logits, sums = lax.fori_loop(0, steps - 1, step_and_next, (logits, sums))
                sums = add(masked(logits, steps - 1), sums, steps - 1)
                valid = plgpu.broadcasted_iota(jnp.int32, (BLOCK_K,), 0, layout=_ROWS) + start < length
                sums_smem[wg] = jnp.where(valid, sums, 0.0)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_smem.at[wg], sums_gmem.at[b, kv_head, tile])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == hopper.COMPUTE_WARPGROUPS)
        def copy():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(q_consumed.at[slot]))
                head = kv_head * group + lax.div(step, tiles)
                tile = pl.ds(query_tile(step), block_q)
                plgpu.copy_gmem_to_smem(q_gmem.at[b, tile, head], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_gmem.at[b, head, tile], lse_smem.at[slot], q_ready.at[slot])

    sums = jax.ShapeDtypeStruct((batch, kv_heads, tokens), jnp.float32)
    grid = {"kv_head": kv_heads, "batch": batch, "k_tile": tokens // BLOCK}
    return hopper.launch(kernel, sums, arrays, grid)(lengths, q, k, lse)
