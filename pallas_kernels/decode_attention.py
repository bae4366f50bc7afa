"""Decode attention over a packed region and a full-precision tail, in one pass.

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import decode_products as products
from pallas_kernels import hopper
from pallas_kernels.arrays import Packed, Region, Storage, check_packed, check_supported
from pallas_kernels.decode_products import QUERIES, UNIT, WARPS, WarpLayout

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
_KERNEL = "Pallas decode kernel"
TILE = WARPS * products.WARP_TOKENS  # tokens
TAIL_TILE = WARPS * UNIT  # tokens
_COPIED_FACTORS = 32  # per copy: the most that a tile has; JAX 0.10 copies no fewer bytes
_FACTOR_MULTIPLE = 4  # rows of factors are padded to a multiple, as copies need it
_LOG2E = math.log2(math.e)
_LOWEST_FLOAT32 = float(jnp.finfo(jnp.float32).min)

# Per warp: maxima (in log 2), denominators, unnormalised output.
State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of the decode kernel; changes nothing that it computes.

    Attributes:
      stages: stages per warpgroup's ring; one holds the keys or the values of a tile.
      splits: thread blocks that share a row.
    """

    stages: int
    splits: int

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: expected at least 2")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits}: expected at least 1")


def heuristic_config(rows: int, tokens: int, warp: WarpLayout) -> Config:
    """As many stages as fit, and as many thread blocks as multiprocessors, but at least one per row."""
    splits = min(max(hopper.MULTIPROCESSORS // rows, 1), -(-tokens // TILE))
    words = 4 * UNIT * max(warp.k_bits, warp.v_bits) * warp.head_dim
    stage = words + 2 * 2 * TILE // warp.group_size * warp.head_dim
    return Config(stages=min(6, hopper.MAX_SHARED_BYTES // (hopper.COMPUTE_WARPGROUPS * stage)), splits=splits)


def decode_attention(
    q: Float[Array, "B N H"],
    packed: Region[Packed],
    tail: Region[Array],
    *,
    storage: Storage,
    scale: float,
    config: Config | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query token per row over the packed tokens and the tail.

    Attends to every valid slot; slots beyond the lengths may hold anything, NaN included. Scales, zeros (times their
    factors), queries and the tail must be within float16.

    Args:
      q: `[B, N, H]`, bfloat16 or float16; bfloat16 if the metadata are float8_e4m3fn.
      packed: keys and values of capacity `P`, which may be 0; lengths are multiples of the packing block, and factors
        of float8 metadata are for `group_size` tokens each.
      tail: keys and values `[B, K, C, H]` in q's dtype; `C` may be 0.
      storage: bits and group size of `packed`.
      scale: softmax scale, positive.
      config: tuning; a heuristic by default.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      ValueError: for shapes or dtypes that do not match, or a config that does not fit the device.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    check(q, packed, tail, storage)
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: the {_KERNEL} supports positive scales")
    hopper.check_available()
    return launch(q, packed, tail, storage=storage, scale=scale, config=config)


def check(q: jax.Array, packed: Region[Packed], tail: Region[Array], storage: Storage) -> None:
    """Refuses what the kernel does not support, from shapes and dtypes.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes or dtypes that do not match.
    """
    check_packed(_KERNEL, packed, storage)
    check_supported(_KERNEL, ("q.dtype", q.dtype.name, DTYPES), ("head_dim", q.shape[-1], HEAD_DIMS))
    if packed.k.factors is not None and q.dtype != jnp.bfloat16:
        # Scales and zeros are rounded to float16: small against bfloat16's own rounding, too much against float16's.
        raise NotImplementedError(f"q.dtype={q.dtype}: the {_KERNEL} reads float8 metadata for bfloat16 queries only")
    if q.ndim != 3 or tail.k.ndim != 4:
        raise ValueError(f"q {q.shape}, tail.k {tail.k.shape}: expected [B, N, H] and [B, K, C, H]")
    if tail.k.dtype != q.dtype or tail.v.dtype != q.dtype:
        raise ValueError(f"the tail has dtypes {tail.k.dtype} and {tail.v.dtype}: expected q's dtype, {q.dtype}")
    heads, head_dim = q.shape[1:]
    kv_heads = tail.k.shape[1]
    if head_dim % storage.group_size:
        raise NotImplementedError(f"group_size={storage.group_size}: does not divide head_dim {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads: expected a multiple")
    _check_shapes(q, packed, tail, storage)


def _check_shapes(q: jax.Array, packed: Region[Packed], tail: Region[Array], storage: Storage) -> None:
    (batch, _, head_dim), (_, kv_heads, tail_capacity, _) = q.shape, tail.k.shape
    group_size = storage.group_size
    capacity = packed.k.planes[0].shape[2] * 32 // storage.k_bits
    if capacity % group_size:
        raise ValueError(f"packed capacity {capacity}: expected a multiple of {group_size}")
    for name, array, rows, columns in (
        ("packed.k.planes", packed.k.planes[0], capacity * storage.k_bits // 32, head_dim),
        ("packed.v.planes", packed.v.planes[0], capacity * storage.v_bits // 32, head_dim),
        ("packed.k.scale", packed.k.scale, capacity // group_size, head_dim),
        ("packed.k.zero", packed.k.zero, capacity // group_size, head_dim),
        ("packed.v.scale", packed.v.scale, capacity, head_dim // group_size),
        ("packed.v.zero", packed.v.zero, capacity, head_dim // group_size),
        *(("packed.k.factors", x, capacity // group_size, 1) for x in packed.k.factors or ()),
        *(("packed.v.factors", x, capacity // group_size, 1) for x in packed.v.factors or ()),
        ("tail.v", tail.v, tail_capacity, head_dim),
        ("tail.k", tail.k, tail_capacity, head_dim),
    ):
        if array.shape != (batch, kv_heads, rows, columns):
            raise ValueError(f"{name} has shape {array.shape}: expected {(batch, kv_heads, rows, columns)}")


def scratch(config: Config, warp: WarpLayout, metadata_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a thread block."""
    ring = (hopper.COMPUTE_WARPGROUPS, config.stages)
    word_rows = UNIT * max(warp.k_bits, warp.v_bits)
    metadata = _swizzled(*ring, TILE // warp.group_size, warp.head_dim, dtype=metadata_dtype)
    has_factors = metadata_dtype == jnp.float8_e4m3fn
    barriers = math.prod(ring)
    factors = {"factor_smem": plgpu.SMEM((*ring, 2, _COPIED_FACTORS), jnp.float32)} if has_factors else {}
    return factors | {
        "words_smem": _swizzled(*ring, word_rows, warp.head_dim, dtype=jnp.uint32),
        "scale_smem": metadata,
        "zero_smem": metadata,
        "ready": plgpu.Barrier(num_arrivals=5 if has_factors else 3, num_barriers=barriers),
        "consumed": plgpu.Barrier(num_barriers=barriers),
    }


def _swizzled(*shape: int, dtype: Any) -> Any:
    """Swizzled shared memory in tiles of one row; an array in device memory must be a whole number of taller tiles.

    Each stage has at least as many rows as the swizzle's pattern, so that every stage begins with a new pattern.
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
    packed: Region[Packed],
    tail: Region[Array],
    *,
    storage: Storage,
    scale: float,
    config: Config | None = None,
) -> jax.Array:
    """`decode_attention` without its checks."""
    batch, heads, head_dim = q.shape
    kv_rows = batch * tail.k.shape[1]
    group = heads * batch // kv_rows
    blocks = -(-group // QUERIES)
    queries = q.astype(jnp.float16).reshape(kv_rows, group, head_dim)
    queries = jnp.pad(queries, [(0, 0), (0, blocks * QUERIES - group), (0, 0)])

    def rows(x: jax.Array, tile_rows: int) -> jax.Array:
        """Reshapes to `[B * K, rows, H]` and pads to one tile; the metadata of `g` tokens form a row."""
        x = x.reshape(kv_rows, -1, head_dim)
        return jnp.pad(x, [(0, 0), (0, max(0, tile_rows - x.shape[1])), (0, 0)])

    def factor_rows(x: jax.Array) -> jax.Array:
        """Reshapes to `[B * K, P / g]` and pads to one copy and to aligned rows."""
        x = x.reshape(kv_rows, -1)
        return jnp.pad(x, [(0, 0), (0, max(_COPIED_FACTORS - x.shape[1], -x.shape[1] % _FACTOR_MULTIPLE))])

    def packed_rows(x: Packed, bits: int) -> Packed:
        scale, zero = (rows(y, TILE // storage.group_size) for y in (x.scale, x.zero))
        factors = None if x.factors is None else (factor_rows(x.factors[0]), factor_rows(x.factors[1]))
        return Packed((rows(x.planes[0], UNIT * bits),), scale, zero, factors)

    packed = Region(
        packed_rows(packed.k, storage.k_bits),
        packed_rows(packed.v, storage.v_bits),
        packed.length.astype(jnp.int32),
    )
    tail = Region(rows(tail.k, TAIL_TILE), rows(tail.v, TAIL_TILE), tail.length.astype(jnp.int32))
    warp = WarpLayout(storage.k_bits, storage.v_bits, storage.group_size, head_dim)
    if config is None:
        tokens = packed.k.scale.shape[1] * storage.group_size + tail.k.shape[1]
        config = heuristic_config(kv_rows * blocks, tokens, warp)
    queries = queries.reshape(kv_rows, blocks, QUERIES, head_dim)
    parts = attend(queries, packed, tail, warp, scale=scale, config=config)
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
    packed: Region[Packed],
    tail: Region[Array],
    warp: WarpLayout,
    *,
    scale: float,
    config: Config,
) -> State:
    """The parts of each row, one per warp: twice `[B * K, blocks, parts, WARPS, 8]` and `[..., 8, H]`.

    Args:
      q: `[B * K, blocks, 8, H]`, float16.
      packed, tail: arrays of rows `[B * K, ..., H]`, factors `[B * K, ...]`, of at least one tile each; lengths `[B]`.
      warp: where the lanes of a warp hold them.
      scale: softmax scale.
      config: tuning.
    """
    kv_rows, blocks, _, head_dim = q.shape
    kv_heads = kv_rows // packed.length.shape[0]
    arrays = scratch(config, warp, packed.k.scale.dtype)
    hopper.check_shared_memory(arrays, config)
    stages, warpgroups = config.stages, hopper.COMPUTE_WARPGROUPS
    metadata_rows = TILE // warp.group_size
    has_factors = packed.k.factors is not None
    logit_scale = scale * _LOG2E

    def kernel(
        q_gmem,
        packed_gmem,
        tail_gmem,
        top_gmem,
        total_gmem,
        out_gmem,
        *,
        shared,
    ):
        kv_row, block, split = (lax.axis_index(name) for name in ("kv_row", "block", "split"))
        packed_tokens, tail_tokens = (
            region.length[lax.div(kv_row, jnp.int32(kv_heads))] for region in (packed_gmem, tail_gmem)
        )
        packed_tiles = _tiles(packed_tokens, TILE)
        tiles = packed_tiles + _tiles(tail_tokens, TAIL_TILE)
        first, last = (lax.div(tiles * (split + i), jnp.int32(config.splits)) for i in range(2))
        middle = jnp.clip(packed_tiles, first, last)
        wg = lax.axis_index("warpgroup")

        def stage(warpgroup, number):
            """Index into ring and barriers for a warpgroup's `number`-th keys or values."""
            slot = lax.rem(number, jnp.int32(stages))
            return slot, warpgroup * stages + slot

        @pl.when(wg < warpgroups)
        def compute():
            plgpu.set_max_registers(hopper.COMPUTE_REGISTERS, action="increase")
            queries = hopper.load(q_gmem.at[kv_row, block], warp.queries)

            def softmax(logits, state: State):
                """Softmax weights of new logits, and the state with its output rescaled to the new maxima."""
                top, total, out = state
                new_top = jnp.maximum(top, logits.max(axis=1) * logit_scale)
                weights = jnp.exp2(logits * logit_scale - products.over_rows(new_top, logits.shape))
                correction = jnp.exp2(top - new_top)
                total = total * correction + weights.sum(axis=1)
                return weights, (new_top, total, out * products.over_rows(correction, out.shape))

            def load_stage(number, bits, words_layout, metadata_layout):
                """Codes, scales and zeros from the ring; the stage may then be filled again."""
                slot, barrier = stage(wg, number)
                plgpu.barrier_wait(shared.ready.at[barrier])
                words = shared.words_smem.at[wg, slot, pl.ds(0, UNIT * bits)]
                codes = hopper.load(words, words_layout)
                metadata = [x.at[wg, slot, pl.ds(0, metadata_rows)] for x in (shared.scale_smem, shared.zero_smem)]
                metadata = [hopper.load(x, metadata_layout) for x in metadata]
                if has_factors:
                    factors = (shared.factor_smem.at[wg, slot, i, pl.ds(0, metadata_rows)] for i in range(2))
                    factors = (hopper.load(x, metadata_layout.reduce(1)) for x in factors)
                    metadata = [products.scaled(x, y, metadata_layout) for x, y in zip(metadata, factors, strict=True)]
                plgpu.commit_smem()  # orders the loads before the copies that fill the stage again
                plgpu.barrier_arrive(shared.consumed.at[barrier])
                scales, zeros = (_float16(x) for x in metadata)
                return codes, scales, zeros

            def packed_tile(tile, state: State) -> State:
                number = 2 * lax.div(tile - first, jnp.int32(warpgroups))
                units = lax.div(packed_tokens - tile * TILE, jnp.int32(UNIT))
                partial = units < TILE // UNIT
                keys = load_stage(number, warp.k_bits, warp.k_words, warp.k_metadata)
                logits = products.key_products(warp, *keys, queries)
                logits = lax.cond(partial, lambda x: products.mask_logits(x, units), lambda x: x, logits)
                weights, (top, total, out) = softmax(logits, state)
                codes, scales, zeros = load_stage(number + 1, warp.v_bits, warp.v_words, warp.v_metadata)
                scales, zeros = lax.cond(
                    partial,
                    lambda *x: tuple(products.mask_metadata(warp, y, units) for y in x),
                    lambda *x: x,
                    scales,
                    zeros,
                )
                return top, total, products.value_products(warp, out, weights, codes, scales, zeros)

            def tail_tile(tile, state: State) -> State:
                # A tile that would pass the end is moved back to it, and the tokens that it repeats are masked.
                start = (tile - packed_tiles) * TAIL_TILE
                begin = jnp.minimum(start, tail_gmem.k.shape[1] - TAIL_TILE)
                keys, values = (
                    hopper.load(ref.at[kv_row, pl.ds(begin, TAIL_TILE)], layout)
                    for ref, layout in ((tail_gmem.k, warp.tail_k), (tail_gmem.v, warp.tail_v))
                )
                logits = products.tail_key_products(warp, _float16(keys), queries)
                logits = products.mask_tail_logits(logits, start - begin, tail_tokens - begin)
                weights, (top, total, out) = softmax(logits, state)
                values = products.mask_tail_values(warp, _float16(values), tail_tokens - begin)
                return top, total, products.tail_value_products(warp, out, weights, values)

            def own_tiles(begin, end, step: Callable[[jax.Array, State], State], state: State) -> State:
                """Loops over this warpgroup's tiles among `begin .. end - 1`."""
                own = begin + lax.rem(begin - first + wg, jnp.int32(warpgroups))
                count = lax.div(end - own + warpgroups - 1, jnp.int32(warpgroups))
                return lax.fori_loop(0, count, lambda i, state: step(own + warpgroups * i, state), state)

            state = own_tiles(first, middle, packed_tile, products.empty(warp, _LOWEST_FLOAT32))
            state = own_tiles(middle, last, tail_tile, state)
            part = split * warpgroups + wg
            top, total, out = state
            top_gmem[kv_row, block, part] = top
            total_gmem[kv_row, block, part] = total
            out_gmem[kv_row, block, part] = products.by_channels(warp, out)

        @pl.when(wg == warpgroups)
        def copy():
            plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action="decrease")

            def fill(tile, side: Any, bits, place):
                """Copies the keys (`place` 0 of a tile's two stages) or the values (1) of a tile."""
                owner = lax.rem(tile - first, jnp.int32(warpgroups))
                number = 2 * lax.div(tile - first, jnp.int32(warpgroups)) + place
                slot, barrier = stage(owner, number)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(shared.consumed.at[barrier]))
                rows = pl.ds(tile * UNIT * bits, UNIT * bits)
                target = shared.words_smem.at[owner, slot, pl.ds(0, UNIT * bits)]
                plgpu.copy_gmem_to_smem(side.planes[0].at[kv_row, rows], target, shared.ready.at[barrier])
                own = pl.ds(tile * metadata_rows, metadata_rows)
                for i, (source, ring) in enumerate(((side.scale, shared.scale_smem), (side.zero, shared.zero_smem))):
                    target = ring.at[owner, slot, pl.ds(0, metadata_rows)]
                    plgpu.copy_gmem_to_smem(source.at[kv_row, own], target, shared.ready.at[barrier])
                    if side.factors is not None:
                        factors = side.factors[i].at[kv_row, pl.ds(tile * metadata_rows, _COPIED_FACTORS)]
                        plgpu.copy_gmem_to_smem(
                            factors, shared.factor_smem.at[owner, slot, i], shared.ready.at[barrier]
                        )

            @pl.loop(first, middle)
            def _(tile):
                fill(tile, packed_gmem.k, warp.k_bits, 0)
                fill(tile, packed_gmem.v, warp.v_bits, 1)

    lead = (kv_rows, blocks, config.splits * warpgroups, WARPS)
    columns = jax.ShapeDtypeStruct((*lead, QUERIES), jnp.float32)
    outs = (columns, columns, jax.ShapeDtypeStruct((*lead, QUERIES, head_dim), jnp.float32))
    grid = {"split": config.splits, "block": blocks, "kv_row": kv_rows}
    return hopper.launch(kernel, outs, arrays, grid)(q, packed, tail)


def _tiles(tokens: jax.Array, size: int) -> jax.Array:
    return lax.div(tokens + (size - 1), jnp.int32(size))


def _float16(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float16 else x.astype(jnp.float32).astype(jnp.float16)
