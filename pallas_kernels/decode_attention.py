"""Decode attention over packed keys and values plus a full-precision tail, in one pass.

A thread block owns a share of one row's tiles (a row is one batch entry, KV head and block of 8 queries) and deals
them to its two compute warpgroups in turn; the third warpgroup keeps a ring of stages full for each of them (keys of a
tile, values of a tile, keys of the next, ...). The four warps of a warpgroup share nothing: every warp has its own
softmax and its own output (`decode_products.py`), and `merge` joins them by (maximum, denominator). Tiles of the tail,
which are few, are read into registers directly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decode_products as products
from pallas_kernels import hopper
from pallas_kernels.decode_products import QUERIES, UNIT, WARPS, Storage

BITS = (2, 4)
GROUP_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
DTYPES = ("bfloat16", "float16")
TILE = WARPS * products.WARP_TOKENS
TAIL_TILE = WARPS * UNIT
_FACTORS = 32  # copied at a time: the most that a tile has; JAX 0.10 copies no fewer bytes
_FACTOR_ROW = 4  # a row of factors is a multiple, as copies want it
_LOG2E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)

State = tuple[jax.Array, jax.Array, jax.Array]  # of each warp: maxima (in log 2), denominators, unnormalised output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning only: never changes the meaning.

    Attributes:
      stages: stages of a warpgroup's ring; one holds the keys or the values of a tile.
      splits: thread blocks that share a row.
    """

    stages: int
    splits: int

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits}: expected at least 1")


def heuristic_config(rows: int, tokens: int, storage: Storage) -> Config:
    """As many stages as fit, and as many thread blocks as multiprocessors, or one a row where there are more rows."""
    splits = min(max(hopper.MULTIPROCESSORS // rows, 1), -(-tokens // TILE))
    words = 4 * UNIT * max(storage.k_bits, storage.v_bits) * storage.head_dim
    stage = words + 2 * 2 * TILE // storage.group_size * storage.head_dim
    return Config(stages=min(6, hopper.MAX_SHARED_BYTES // (hopper.COMPUTE_WARPGROUPS * stage)), splits=splits)


def decode_attention(
    q: jax.Array,
    k_planes: tuple[jax.Array, ...],
    k_scale: jax.Array,
    k_zero: jax.Array,
    v_planes: tuple[jax.Array, ...],
    v_scale: jax.Array,
    v_zero: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    packed_length: jax.Array,
    tail_length: jax.Array,
    *,
    k_bits: int,
    v_bits: int,
    group_size: int,
    scale: float,
    k_factors: tuple[jax.Array, jax.Array] | None = None,
    v_factors: tuple[jax.Array, jax.Array] | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Attention of one query token over `packed_length[b]` packed and `tail_length[b]` full-precision tokens.

    Every valid slot is seen; what lies beyond the lengths may be anything, NaN included. Scales, zeros (times their
    factors), queries and the tail must be within float16.

    Args:
      q: `[B, N, H]`, bfloat16 or float16.
      k_planes, v_planes: one uint32 array `[B, K, P * bits / 32, H]` each; `P` may be 0.
      k_scale, k_zero: `[B, K, P / g, H]`, float16, bfloat16 or, with bfloat16 queries, float8_e4m3fn.
      v_scale, v_zero: `[B, K, P, H / g]`, the same dtype.
      tail_k, tail_v: `[B, K, C, H]` in q's dtype; `C` may be 0.
      packed_length: int32 `[B]`, multiples of the packing block, at most `P`.
      tail_length: int32 `[B]`, at most `C`.
      scale: softmax scale, positive.
      k_factors, v_factors: (scale factor, zero factor), float32 `[B, K, P / g, 1]`, for 8-bit metadata.
      config: tuning.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      ValueError: for shapes or dtypes that do not belong together, or a config that does not fit the device.
      NotImplementedError: for a case the kernel does not cover, or where it cannot run.
    """
    metadata = (k_scale, k_zero, v_scale, v_zero)
    factors = (*(k_factors or ()), *(v_factors or ()))
    check(q, k_planes, v_planes, metadata, factors, (tail_k, tail_v), k_bits, v_bits, group_size)
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: the Pallas decode kernel supports positive scales")
    reason = hopper.why_unavailable()
    if reason:
        raise NotImplementedError(reason)
    words, tail, lengths = (k_planes[0], v_planes[0]), (tail_k, tail_v), (packed_length, tail_length)
    storage = Storage(k_bits, v_bits, group_size, q.shape[2])
    return launch(q, words, metadata, factors, tail, lengths, scale=scale, storage=storage, config=config)


def check(
    q: jax.Array,
    k_planes: tuple[jax.Array, ...],
    v_planes: tuple[jax.Array, ...],
    metadata: tuple[jax.Array, ...],
    factors: tuple[jax.Array, ...],
    tail: tuple[jax.Array, jax.Array],
    k_bits: int,
    v_bits: int,
    group_size: int,
) -> None:
    """Refuses what the kernel does not cover; looks at shapes and dtypes alone.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes or dtypes that do not belong together.
    """
    supported: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("k_bits", k_bits, BITS),
        ("v_bits", v_bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata dtype", metadata[0].dtype.name, METADATA_DTYPES),
        ("q.dtype", q.dtype.name, DTYPES),
        ("head_dim", q.shape[-1], HEAD_DIMS),
    )
    for name, value, values in supported:
        if value not in values:
            raise NotImplementedError(
                f"{name}={value}: the Pallas decode kernel supports {', '.join(map(str, values))}"
            )
    has_factors = metadata[0].dtype == jnp.float8_e4m3fn
    if has_factors and q.dtype != jnp.bfloat16:
        # Scales and zeros are rounded to float16: small against bfloat16's own rounding, too much against float16's.
        raise NotImplementedError(
            f"q.dtype={q.dtype}: the Pallas decode kernel reads 8-bit metadata for bfloat16 alone"
        )
    if len(factors) != 4 * has_factors:
        raise ValueError(f"{len(factors)} factors with {metadata[0].dtype} metadata: expected {4 * has_factors}")
    if q.ndim != 3 or tail[0].ndim != 4 or len(k_planes) != 1 or len(v_planes) != 1:
        raise ValueError(f"q {q.shape}, tail_k {tail[0].shape}: expected [B, N, H], [B, K, C, H] and one plane each")
    batch, heads, head_dim = q.shape
    kv_heads, packed = tail[0].shape[1], k_planes[0].shape[2] * 32 // k_bits
    if head_dim % group_size:
        raise NotImplementedError(f"group_size={group_size}: does not divide head_dim {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads: expected a multiple")
    if packed % group_size:
        raise ValueError(f"packed capacity {packed}: expected a multiple of {group_size}")
    for name, array, rows, columns in (
        ("k_planes", k_planes[0], packed * k_bits // 32, head_dim),
        ("v_planes", v_planes[0], packed * v_bits // 32, head_dim),
        ("k_scale", metadata[0], packed // group_size, head_dim),
        ("k_zero", metadata[1], packed // group_size, head_dim),
        ("v_scale", metadata[2], packed, head_dim // group_size),
        ("v_zero", metadata[3], packed, head_dim // group_size),
        *(("factors", x, packed // group_size, 1) for x in factors),
        ("tail_v", tail[1], tail[0].shape[2], head_dim),
        ("tail_k", tail[0], tail[0].shape[2], head_dim),
    ):
        if array.shape != (batch, kv_heads, rows, columns):
            raise ValueError(f"{name} has shape {array.shape}: expected {(batch, kv_heads, rows, columns)}")
    if tail[0].dtype != q.dtype or tail[1].dtype != q.dtype or any(x.dtype != metadata[0].dtype for x in metadata):
        raise ValueError("expected tail_k and tail_v in q's dtype, and scales and zeros in one dtype")


def scratch(config: Config, storage: Storage, metadata_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    ring = (hopper.COMPUTE_WARPGROUPS, config.stages)
    word_rows = UNIT * max(storage.k_bits, storage.v_bits)
    metadata = _swizzled(*ring, TILE // storage.group_size, storage.head_dim, dtype=metadata_dtype)
    has_factors = metadata_dtype == jnp.float8_e4m3fn
    barriers = math.prod(ring)
    factors = {"factor_smem": plgpu.SMEM((*ring, 2, _FACTORS), jnp.float32)} if has_factors else {}
    return factors | {
        "words_smem": _swizzled(*ring, word_rows, storage.head_dim, dtype=jnp.uint32),
        "scale_smem": metadata,
        "zero_smem": metadata,
        "ready": plgpu.Barrier(num_arrivals=5 if has_factors else 3, num_barriers=barriers),
        "consumed": plgpu.Barrier(num_barriers=barriers),
    }


def _swizzled(*shape: int, dtype: Any) -> Any:
    """Tiles of one row: of taller ones, an array in device memory would have to hold a whole number.

    There are at least as many rows as the swizzle's pattern takes, so that every stage begins with one.
    """
    *lead, rows, columns = shape
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * itemsize)
    rows = max(rows, 8 * swizzle // (columns * itemsize))
    transforms = plgpu.TilingTransform((1, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM((*lead, rows, columns), dtype, transforms=transforms)


@functools.partial(jax.jit, static_argnames=("scale", "storage", "config"))  # lowered once for all layers of a model
def launch(
    q: jax.Array,
    words: tuple[jax.Array, jax.Array],
    metadata: tuple[jax.Array, ...],
    factors: tuple[jax.Array, ...],
    tail: tuple[jax.Array, jax.Array],
    lengths: tuple[jax.Array, jax.Array],
    *,
    scale: float,
    storage: Storage,
    config: Config | None = None,
) -> jax.Array:
    """`decode_attention` without its checks."""
    batch, heads, head_dim = q.shape
    kv_rows = batch * tail[0].shape[1]
    group = heads * batch // kv_rows
    blocks = -(-group // QUERIES)
    queries = q.astype(jnp.float16).reshape(kv_rows, group, head_dim)
    queries = jnp.pad(queries, [(0, 0), (0, blocks * QUERIES - group), (0, 0)])

    def rows(x: jax.Array, least: int) -> jax.Array:
        """`[B * K, rows, H]`; what is too short for one tile is made longer. Metadata of `g` tokens make a row."""
        x = x.reshape(kv_rows, -1, head_dim)
        return jnp.pad(x, [(0, 0), (0, max(0, least - x.shape[1])), (0, 0)])

    def factor_rows(x: jax.Array) -> jax.Array:
        """`[B * K, P / g]`, likewise."""
        x = x.reshape(kv_rows, -1)
        return jnp.pad(x, [(0, 0), (0, max(_FACTORS - x.shape[1], -x.shape[1] % _FACTOR_ROW))])

    metadata = tuple(rows(x, TILE // storage.group_size) for x in metadata)
    factors = tuple(factor_rows(x) for x in factors)
    words = rows(words[0], UNIT * storage.k_bits), rows(words[1], UNIT * storage.v_bits)
    tail = rows(tail[0], TAIL_TILE), rows(tail[1], TAIL_TILE)
    if config is None:
        tokens = metadata[0].shape[1] * storage.group_size + tail[0].shape[1]
        config = heuristic_config(kv_rows * blocks, tokens, storage)
    queries = queries.reshape(kv_rows, blocks, QUERIES, head_dim)
    parts = attend(queries, words, metadata, factors, tail, lengths, scale, storage, config)
    out = merge(*(x[:, :, :, :, : min(group, QUERIES)] for x in parts))
    return out.reshape(kv_rows, -1, head_dim)[:, :group].reshape(q.shape).astype(q.dtype)


def merge(top: jax.Array, total: jax.Array, out: jax.Array) -> jax.Array:
    """Joins a row's parts, `[B * K, blocks, parts, WARPS, queries, ...]`: float32 `[B * K, blocks, queries, H]`."""
    weight = jnp.exp2(top - top.max(axis=(2, 3), keepdims=True))
    total = (total * weight).sum(axis=(2, 3), keepdims=True)
    weight = weight / jnp.where(total == 0, 1.0, total)
    return (out * weight[..., None]).sum(axis=(2, 3))


def attend(
    q: jax.Array,
    words: tuple[jax.Array, jax.Array],
    metadata: tuple[jax.Array, ...],
    factors: tuple[jax.Array, ...],
    tail: tuple[jax.Array, jax.Array],
    lengths: tuple[jax.Array, jax.Array],
    scale: float,
    storage: Storage,
    config: Config,
) -> State:
    """The parts of each row, one per warp: twice `[B * K, blocks, parts, WARPS, 8]` and `[..., 8, H]`.

    Arrays have rows `[B * K, ..., H]` and hold at least a tile; q is `[B * K, blocks, 8, H]` in float16.
    """
    kv_rows, blocks, _, head_dim = q.shape
    kv_heads = kv_rows // lengths[0].shape[0]
    arrays = scratch(config, storage, metadata[0].dtype)
    hopper.check_shared_memory(arrays, config)
    stages, warpgroups = config.stages, hopper.COMPUTE_WARPGROUPS
    metadata_rows = TILE // storage.group_size
    logit_scale = scale * _LOG2E

    def kernel(
        q_gmem,
        words_gmem,
        metadata_gmem,
        factors_gmem,
        tail_gmem,
        lengths_gmem,
        top_gmem,
        total_gmem,
        out_gmem,
        *,
        words_smem,
        scale_smem,
        zero_smem,
        ready,
        consumed,
        factor_smem: Any = None,  # of 8-bit metadata alone
    ):
        kv_row, block, split = (lax.axis_index(name) for name in ("kv_row", "block", "split"))
        packed_tokens, tail_tokens = (x[lax.div(kv_row, jnp.int32(kv_heads))] for x in lengths_gmem)
        packed_tiles = _tiles(packed_tokens, TILE)
        tiles = packed_tiles + _tiles(tail_tokens, TAIL_TILE)
        first, last = (lax.div(tiles * (split + i), jnp.int32(config.splits)) for i in range(2))
        middle = jnp.clip(packed_tiles, first, last)
        wg = lax.axis_index("warpgroup")

        def stage(warpgroup, number):
            """Of a warpgroup's `number`-th keys or values: its place in the ring, and its barriers'."""
            slot = lax.rem(number, jnp.int32(stages))
            return slot, warpgroup * stages + slot

        @pl.when(wg < warpgroups)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            queries = hopper.load(q_gmem.at[kv_row, block], storage.queries)

            def softmax(logits, state: State):
                """The weights of new logits, and the state with its output scaled to the new maxima."""
                top, total, out = state
                new_top = jnp.maximum(top, logits.max(axis=1) * logit_scale)
                weights = jnp.exp2(logits * logit_scale - products.over_rows(new_top, logits.shape))
                correction = jnp.exp2(top - new_top)
                total = total * correction + weights.sum(axis=1)
                return weights, (new_top, total, out * products.over_rows(correction, out.shape))

            def load_stage(number, bits, words_layout, metadata_layout):
                """Codes, scales and zeros from the ring, which may then be filled again."""
                slot, barrier = stage(wg, number)
                plgpu.barrier_wait(ready.at[barrier])
                words = words_smem.at[wg, slot, pl.ds(0, UNIT * bits)]
                codes = hopper.load(words, words_layout)
                metadata = [x.at[wg, slot, pl.ds(0, metadata_rows)] for x in (scale_smem, zero_smem)]
                metadata = [hopper.load(x, metadata_layout) for x in metadata]
                if factors_gmem:
                    factors = (factor_smem.at[wg, slot, i, pl.ds(0, metadata_rows)] for i in range(2))
                    factors = (hopper.load(x, metadata_layout.reduce(1)) for x in factors)
                    metadata = [products.scaled(x, y, metadata_layout) for x, y in zip(metadata, factors, strict=True)]
                plgpu.commit_smem()  # orders the loads before the copies that fill the stage again
                plgpu.barrier_arrive(consumed.at[barrier])
                scales, zeros = (_float16(x) for x in metadata)
                return codes, scales, zeros

            def packed_tile(tile, state: State) -> State:
                number = 2 * lax.div(tile - first, jnp.int32(warpgroups))
                units = lax.div(packed_tokens - tile * TILE, jnp.int32(UNIT))
                partial = units < TILE // UNIT
                keys = load_stage(number, storage.k_bits, storage.k_words, storage.k_metadata)
                logits = products.key_products(storage, *keys, queries)
                logits = lax.cond(partial, lambda x: products.mask_logits(x, units), lambda x: x, logits)
                weights, (top, total, out) = softmax(logits, state)
                codes, scales, zeros = load_stage(number + 1, storage.v_bits, storage.v_words, storage.v_metadata)
                scales, zeros = lax.cond(
                    partial,
                    lambda *x: tuple(products.mask_metadata(storage, y, units) for y in x),
                    lambda *x: x,
                    scales,
                    zeros,
                )
                return top, total, products.value_products(storage, out, weights, codes, scales, zeros)

            def tail_tile(tile, state: State) -> State:
                # A tile that would pass the end is moved back to it; what it repeats is masked.
                start = (tile - packed_tiles) * TAIL_TILE
                begin = jnp.minimum(start, tail_gmem[0].shape[1] - TAIL_TILE)
                keys, values = (
                    hopper.load(ref.at[kv_row, pl.ds(begin, TAIL_TILE)], layout)
                    for ref, layout in zip(tail_gmem, (storage.tail_k, storage.tail_v), strict=True)
                )
                logits = products.tail_key_products(storage, _float16(keys), queries)
                logits = products.mask_tail_logits(logits, start - begin, tail_tokens - begin)
                weights, (top, total, out) = softmax(logits, state)
                values = products.mask_tail_values(storage, _float16(values), tail_tokens - begin)
                return top, total, products.tail_value_products(storage, out, weights, values)

            def own_tiles(begin, end, step: Callable[[jax.Array, State], State], state: State) -> State:
                """Goes over those of the tiles `begin .. end - 1` that are this warpgroup's."""
                own = begin + lax.rem(begin - first + wg, jnp.int32(warpgroups))
                count = lax.div(end - own + warpgroups - 1, jnp.int32(warpgroups))
                return lax.fori_loop(0, count, lambda i, state: step(own + warpgroups * i, state), state)

            state = own_tiles(first, middle, packed_tile, products.empty(storage, _LOWEST))
            state = own_tiles(middle, last, tail_tile, state)
            part = split * warpgroups + wg
            top, total, out = state
            top_gmem[kv_row, block, part] = top
            total_gmem[kv_row, block, part] = total
            out_gmem[kv_row, block, part] = products.by_channels(storage, out)

        @pl.when(wg == warpgroups)
        def copy():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def fill(tile, which, bits):
                """Copies the keys (`which` 0) or the values (1) of a tile."""
                owner = lax.rem(tile - first, jnp.int32(warpgroups))
                number = 2 * lax.div(tile - first, jnp.int32(warpgroups)) + which
                slot, barrier = stage(owner, number)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(consumed.at[barrier]))
                rows = pl.ds(tile * UNIT * bits, UNIT * bits)
                target = words_smem.at[owner, slot, pl.ds(0, UNIT * bits)]
                plgpu.copy_gmem_to_smem(words_gmem[which].at[kv_row, rows], target, ready.at[barrier])
                own = pl.ds(tile * metadata_rows, metadata_rows)
                for i, ring in enumerate((scale_smem, zero_smem)):
                    source = metadata_gmem[2 * which + i].at[kv_row, own]
                    target = ring.at[owner, slot, pl.ds(0, metadata_rows)]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[barrier])
                    if factors_gmem:
                        source = factors_gmem[2 * which + i].at[kv_row, pl.ds(tile * metadata_rows, _FACTORS)]
                        plgpu.copy_gmem_to_smem(source, factor_smem.at[owner, slot, i], ready.at[barrier])

            @pl.loop(first, middle)
            def _(tile):
                fill(tile, 0, storage.k_bits)
                fill(tile, 1, storage.v_bits)

    lead = (kv_rows, blocks, config.splits * warpgroups, WARPS)
    columns = jax.ShapeDtypeStruct((*lead, QUERIES), jnp.float32)
    outs = (columns, columns, jax.ShapeDtypeStruct((*lead, QUERIES, head_dim), jnp.float32))
    grid = {"split": config.splits, "block": blocks, "kv_row": kv_rows}
    lengths = (lengths[0].astype(jnp.int32), lengths[1].astype(jnp.int32))
    return hopper.launch(kernel, outs, arrays, grid)(q, words, metadata, factors, tail, lengths)


def _tiles(tokens: jax.Array, size: int) -> jax.Array:
    return lax.div(tokens + (size - 1), jnp.int32(size))


def _float16(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float16 else x.astype(jnp.float32).astype(jnp.float16)
