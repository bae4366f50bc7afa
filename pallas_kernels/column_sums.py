"""Column sums of a causal softmax map, recomputed block by block from the log-sum-exp of its rows.

A thread block owns 64 keys of one KV head for each warpgroup that computes. They are the left operand: logits come out
transposed, so that a key's weights lie in one row. Queries of all heads of the group stream through a ring, from the
keys' own tiles to the row's end; only tiles at an edge (the diagonal, the row's end, the window's) are masked, and go
last. The special function unit is the bottleneck, so some warpgroups exponentiate while others multiply; weights are
added elementwise, and across threads only once. Every sum has one owner and one order, so equal runs are bit-equal.
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

BLOCK_K = 64  # keys per warpgroup
_CHUNK_Q = 32  # queries whose weights are added at a time
_LOG2E = math.log2(math.e)

_WGMMA = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _WGMMA.reduce(1), _WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tuning.Config):
    """Tuning of the second pass.

    Attributes:
      warpgroups: warpgroups that compute.
      block_q: queries per tile.
      stages: tiles of queries in flight.
    """

    warpgroups: int = tuning.choice(2, 4, default=4)
    block_q: int = tuning.choice(64, 128, default=128)
    stages: int = tuning.choice(2, 4, 8, default=4)


def heuristic_config(head_dim: int) -> Config:
    """The config for a kind of device without a record."""
    return Config()


def default_config(head_dim: int) -> Config:
    """The winner recorded for this kind of device, else the heuristic."""
    return tuning.winner("column_sums", Config, head_dim=head_dim) or heuristic_config(head_dim)


def scratch(config: Config, head_dim: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    warpgroups, stages = config.warpgroups, config.stages
    return {
        "k_smem": hopper.operand(warpgroups, BLOCK_K, head_dim, dtype=dtype),
        "q_smem": hopper.operand(stages, config.block_q, head_dim, dtype=dtype),
        "lse_smem": plgpu.SMEM((stages, config.block_q), jnp.float32),
        "sums_smem": plgpu.SMEM((warpgroups, BLOCK_K), jnp.float32),
        "k_ready": plgpu.Barrier(num_barriers=warpgroups),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "q_consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }


@functools.partial(jax.jit, static_argnames=("scale", "window", "config"))  # lowered once for all layers of a model
def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    config: Config,
) -> jax.Array:
    """Pass 2: column sums of the softmax map, over a row's queries and a KV head's query heads, float32 `[B, K, T]`.

    Args:
      q, k: as in `prefill_attention`; `T` is a multiple of 128.
      lse: as `flash_attention` returns it.
      lengths: int32 `[B]`.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    warpgroups, block_q, stages = config.warpgroups, config.block_q, config.stages
    block_k = BLOCK_K * warpgroups
    arrays = scratch(config, head_dim, q.dtype)
    hopper.check_shared_memory(arrays, config)
    logit_scale = scale * _LOG2E
    k_tiles, group = pl.cdiv(tokens, block_k), heads // kv_heads
    parts = parts_of(group, k_tiles, batch * kv_heads)
    members = group // parts  # heads per block
    head_bytes = q.nbytes // (batch * heads)  # one head is read at a time
    section = parts * hopper.streams_per_section(batch * kv_heads, head_bytes)  # parts whose blocks start side by side

    def kernel(
        lengths_gmem,
        q_gmem,
        k_gmem,
        lse_gmem,
        sums_gmem,
        *,
        shared,
    ):
        row_part = lax.axis_index("section") * section + lax.axis_index("member")
        b, part = lax.div(row_part, jnp.int32(kv_heads * parts)), lax.rem(row_part, jnp.int32(kv_heads * parts))
        first_head = part * members
        kv_head = lax.div(first_head, jnp.int32(group))
        first_key = lax.axis_index("k_tile") * block_k
        length = lengths_gmem[b]
        # Queries before `seen_by_all` see every key, queries before `seen_by_any` at least one.
        seen_by_all = seen_by_any = length
        if window is not None:
            seen_by_all = jnp.minimum(length, first_key + window)
            seen_by_any = jnp.minimum(length, first_key + window + (block_k - 1))
        # Tiles of one head's queries. The first hold the diagonal, the `inner` next ones need no mask, the rest do.
        tiles = lax.div(jnp.maximum(seen_by_any - first_key, 0) + (block_q - 1), jnp.int32(block_q))
        diagonal = jnp.minimum(tiles, pl.cdiv(block_k, block_q))
        inner = jnp.maximum(lax.div(jnp.maximum(seen_by_all - first_key, 0), jnp.int32(block_q)) - diagonal, 0)
        wg = lax.axis_index("warpgroup")

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        def first_query(tile):
            """First query of the tile that is processed as number `tile`: unmasked tiles first, the diagonal last."""
            return first_key + block_q * (tile + jnp.where(tile < tiles - diagonal, diagonal, diagonal - tiles))

        @pl.when(wg < warpgroups)
        def compute():
            plgpu.set_max_registers(hopper.REGISTERS[warpgroups][0], action="increase")
            start = first_key + wg * BLOCK_K
            own = pl.ds(start, BLOCK_K)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, own, kv_head], shared.k_smem.at[wg], shared.k_ready.at[wg])
            plgpu.barrier_wait(shared.k_ready.at[wg])
            keys = shared.k_smem.at[wg]
            if warpgroups == 2:  # enough registers to hold them
                keys = plgpu.layout_cast(keys[...], _WGMMA)
            rows = plgpu.broadcasted_iota(jnp.int32, (BLOCK_K,), 0, layout=_ROWS) + start
            # A query sees a key if the key's age, its distance behind the query, is at least 0 and less than this.
            oldest = jnp.maximum(length - rows, 0)
            if window is not None:
                oldest = jnp.minimum(oldest, window)

            def mask(weights, query):
                columns = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=_WGMMA)
                ages = columns + lax.broadcast_in_dim(query - rows, weights.shape, [0])
                limit = lax.broadcast_in_dim(oldest.astype(jnp.uint32), weights.shape, [0])
                return jnp.where(ages.astype(jnp.uint32) < limit, weights, 0.0)  # a negative age is a large one

            def add_tile(masked, slot, query, sums):
                def multiply(acc_ref):
                    plgpu.wgmma(acc_ref, keys, shared.q_smem.at[slot].transpose((1, 0)))
                    return acc_ref[...]

                logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((BLOCK_K, block_q), jnp.float32))
                for i in range(0, block_q, _CHUNK_Q):
                    lse = plgpu.layout_cast(shared.lse_smem[slot, pl.ds(i, _CHUNK_Q)], _COLUMNS)
                    exponents = logits[:, i : i + _CHUNK_Q] * logit_scale
                    weights = jnp.exp2(exponents - lax.broadcast_in_dim(lse, exponents.shape, [1]))
                    sums += mask(weights, query + i) if masked else weights
                return sums

            def add_inner(step, query, sums):
                return add_tile(False, slot_of(step), query, sums)

            def add_edge(step, query, sums):
                """Adds a tile at the block's edge, all of which, or none, may be visible to this warpgroup's keys."""
                last_query = query + (block_q - 1)
                unseen = last_query < start
                seen = (query >= start + (BLOCK_K - 1)) & (last_query < length)
                if window is not None:
                    seen &= last_query < start + window
                kind = jnp.where(unseen, 0, jnp.where(seen, 1, 2))
                add = [functools.partial(add_tile, masked, slot_of(step), query) for masked in (False, True)]
                return lax.switch(kind, [lambda sums: sums, *add], sums)

            def consume(add, member, tile, sums):
                step = member * tiles + tile
                slot = slot_of(step)
                plgpu.barrier_wait(shared.q_ready.at[slot])
                sums = add(step, first_query(tile), sums)
                plgpu.commit_smem()  # orders the loads of log-sum-exps before the copies that fill the stage again
                plgpu.barrier_arrive(shared.q_consumed.at[slot])
                return sums

            def add_head(member, sums):
                sums = lax.fori_loop(0, inner, functools.partial(consume, add_inner, member), sums)
                return lax.fori_loop(inner, tiles, functools.partial(consume, add_edge, member), sums)

            sums = plgpu.layout_cast(jnp.zeros((BLOCK_K, _CHUNK_Q), jnp.float32), _WGMMA)
            sums = lax.fori_loop(0, members, add_head, sums)
            shared.sums_smem[wg] = sums.sum(axis=1)
            plgpu.commit_smem()

            @pl.when(start < tokens)
            def _():
                plgpu.copy_smem_to_gmem(shared.sums_smem.at[wg], sums_gmem.at[b, part, own])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == warpgroups)
        def copy():
            plgpu.set_max_registers(hopper.REGISTERS[warpgroups][1], action="decrease")

            @pl.loop(0, members)
            def _(member):
                head = first_head + member

                @pl.loop(0, tiles)
                def _(tile):
                    step = member * tiles + tile
                    slot = slot_of(step)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(shared.q_consumed.at[slot]))
                    queries = pl.ds(first_query(tile), block_q)
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[b, queries, head], shared.q_smem.at[slot], shared.q_ready.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        lse_gmem.at[b, head, queries], shared.lse_smem.at[slot], shared.q_ready.at[slot]
                    )

    # Early keys go first, because they have the most queries.
    grid = {"section": batch * kv_heads * parts // section, "k_tile": k_tiles, "member": section}
    sums = jax.ShapeDtypeStruct((batch, kv_heads * parts, tokens), jnp.float32)
    sums = hopper.launch(kernel, sums, arrays, grid, warpgroups)(lengths, q, k, lse)
    return sums.reshape(batch, kv_heads, parts, tokens).sum(axis=2)


def parts_of(group: int, k_tiles: int, streams: int) -> int:
    """Number of thread blocks that share a group's heads.

    The smallest number that keeps the longest block within one multiprocessor's share of the work, or the whole group
    if none does. A KV head's `k_tiles` blocks see 1, 2, ... tiles of queries, so its longest block has
    2 / (k_tiles + 1) of the head's work.

    Args:
      group: query heads per KV head; the result divides it.
      k_tiles: blocks of keys per KV head.
      streams: KV heads over all rows.
    """
    blocks = (k_tiles + 1) * streams // 2
    return next(
        (parts for parts in range(1, group) if group % parts == 0 and parts * blocks >= hopper.MULTIPROCESSORS), group
    )
