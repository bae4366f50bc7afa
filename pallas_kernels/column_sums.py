"""Column sums of a causal softmax map, recomputed block by block from the log-sum-exp of its rows.

A thread block owns 128 keys of one KV head, 64 a warpgroup, which stay in registers as the left operand: logits come
out transposed, and a key's weights lie in one row. Queries of all heads of the group stream through a ring, from the
keys' own tile to the row's end; only the tiles at either edge are masked. The warpgroups alternate on the tensor cores:
one multiplies while the other exponentiates. Every sum has one owner and one order, so equal runs are bit-equal.
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

from pallas_kernels import hopper

BLOCK_K = 64  # keys of a warpgroup
BLOCK = BLOCK_K * hopper.COMPUTE_WARPGROUPS
_LOG2E = math.log2(math.e)

_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning only: never changes the meaning.

    Attributes:
      block_q: queries of a tile, at least `BLOCK`.
      stages: tiles of queries in flight.
      chunk: queries whose weights are added at a time, elementwise, so that a row's sum is taken only once.
    """

    block_q: int = 256
    stages: int = 2
    chunk: int = 32

    def __post_init__(self) -> None:
        if self.block_q not in (128, 256):
            raise ValueError(f"block_q={self.block_q}: expected 128 or 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2")
        if self.chunk not in (16, 32, 64):
            raise ValueError(f"chunk={self.chunk}: expected 16, 32 or 64")


def heuristic_config(head_dim: int) -> Config:
    """The fastest measured on an H100."""
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
        "turn": plgpu.Barrier(num_arrivals=warpgroups),
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
    block_q, stages, chunk = config.block_q, config.stages, config.chunk
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
        turn,
    ):
        b, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
        first_key = lax.axis_index("k_tile") * BLOCK
        length = lengths_gmem[b]
        # Every key is seen by the queries in front of `seen_by_all`, some key by those in front of `seen_by_any`.
        seen_by_all = seen_by_any = length
        if window is not None:
            seen_by_all = jnp.minimum(length, first_key + window)
            seen_by_any = jnp.minimum(length, first_key + window + (BLOCK - 1))
        # Tiles of one head's queries; the first holds the diagonal, `inner` after it need no mask, the others do.
        tiles = jnp.maximum(lax.div(seen_by_any - first_key + (block_q - 1), jnp.int32(block_q)), 0)
        tiles = jnp.where(first_key < length, tiles, 0)
        inner = jnp.maximum(lax.div(seen_by_all - first_key, jnp.int32(block_q)) - 1, 0)
        wg = lax.axis_index("warpgroup")

        def first_query(tile):
            """Unmasked tiles go first, the diagonal last."""
            return first_key + lax.rem(tile + 1, tiles) * block_q

        @pl.when(wg < hopper.COMPUTE_WARPGROUPS)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            start = first_key + wg * BLOCK_K
            own = pl.ds(start, BLOCK_K)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, own, kv_head], k_smem.at[wg], k_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[wg])
            keys = plgpu.load(k_smem.at[wg], (), layout=plgpu.Layout.WGMMA)
            rows = plgpu.broadcasted_iota(jnp.int32, (BLOCK_K,), 0, layout=_ROWS) + start
            # A query sees a key if its age, how far behind it the key lies, is from 0 to below this.
            oldest = jnp.maximum(length - rows, 0)
            if window is not None:
                oldest = jnp.minimum(oldest, window)

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def mask(weights, query):
                columns = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=plgpu.Layout.WGMMA)
                ages = columns + lax.broadcast_in_dim(query - rows, weights.shape, [0])
                limit = lax.broadcast_in_dim(oldest.astype(jnp.uint32), weights.shape, [0])
                return jnp.where(ages.astype(jnp.uint32) < limit, weights, 0.0)  # a negative age is a large one

            def add_tile(head, masked, tile, sums):
                slot = lax.rem(head * tiles + tile, jnp.int32(stages))
                plgpu.barrier_wait(q_ready.at[slot])

                def multiply(acc_ref):
                    plgpu.wgmma(acc_ref, keys, plgpu.transpose_ref(q_smem.at[slot], (1, 0)))
                    take_turns()
                    return acc_ref[...]

                logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((BLOCK_K, block_q), jnp.float32))
                for i in range(0, block_q, chunk):
                    lse = plgpu.load(lse_smem.at[slot, pl.ds(i, chunk)], (), layout=_COLUMNS)
                    exponents = logits[:, i : i + chunk] * logit_scale
                    weights = jnp.exp2(exponents - lax.broadcast_in_dim(lse, exponents.shape, [1]))
                    sums += mask(weights, first_query(tile) + i) if masked else weights
                plgpu.barrier_arrive(q_consumed.at[slot])
                # The weights are to be done before the other warpgroup's begin.
                sums = lax.optimization_barrier(sums)
                take_turns()
                return sums

            def add_head(head, sums):
                sums = lax.fori_loop(0, inner, functools.partial(add_tile, head, False), sums)
                return lax.fori_loop(inner, tiles, functools.partial(add_tile, head, True), sums)

            sums = plgpu.layout_cast(jnp.zeros((BLOCK_K, chunk), jnp.float32), plgpu.Layout.WGMMA)
            pl.when(wg == 1)(take_turns)
            sums = lax.fori_loop(0, group, add_head, sums)
            pl.when(wg == 0)(take_turns)
            sums_smem[wg] = sums.sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_smem.at[wg], sums_gmem.at[b, kv_head, own])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == hopper.COMPUTE_WARPGROUPS)
        def copy():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, tiles * group)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(q_consumed.at[slot]))
                head = kv_head * group + lax.div(step, tiles)
                queries = pl.ds(first_query(lax.rem(step, tiles)), block_q)
                plgpu.copy_gmem_to_smem(q_gmem.at[b, queries, head], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_gmem.at[b, head, queries], lse_smem.at[slot], q_ready.at[slot])

    sums = jax.ShapeDtypeStruct((batch, kv_heads, tokens), jnp.float32)
    grid = {"kv_head": kv_heads, "batch": batch, "k_tile": tokens // BLOCK}
    return hopper.launch(kernel, sums, arrays, grid)(lengths, q, k, lse)
