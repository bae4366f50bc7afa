"""Group-wise quantisation and packing of keys and values in one pass over memory.

A warpgroup owns a few rows of words, or of groups if those are longer, over all channels. A thread holds eight or four
channels of a row and walks along the row's tokens, so words are put together without exchanging anything. Keys' groups
lie along the tokens, within a thread; values' groups lie along the channels and take a few shuffles per token. With
float8 metadata a row is a packing block, so its factors take a few shuffles as well.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import fragments, hopper
from pallas_kernels.arrays import BITS, GROUP_SIZES, METADATA_DTYPES, Packed, check_supported

HEAD_DIMS = (64, 128)
DTYPES = ("float32", "bfloat16", "float16")
_KERNEL = "Pallas quantisation kernel"
_WARPS = 4
_LANES = 32
_THREAD_CHANNELS = 8  # channels per thread, or half of them
_FLOAT8_MAX = 448
_MAX_GROUP_IN_REGISTERS = 32  # tokens: registers hold keys' groups up to this size, so that they are read once
_ROUNDER = 2.0**23  # adding it leaves a float32's integer part, rounded half to even, in the lowest bits


def quantize(
    x: Float[Array, "B K S H"],
    *,
    bits: int,
    group_size: int,
    axis: str,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
) -> Packed:
    """Quantises and packs `x`, bit for bit as `docs/packed-layout.md` defines it.

    Args:
      x: `[B, K, S, H]`, float32, bfloat16 or float16; `S` fills whole groups and words.
      bits: 2 or 4.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token.
      metadata_dtype: "float16", "bfloat16" or "float8_e4m3fn".
      factor_block: tokens that share a factor of float8 metadata; only `group_size`, the default, is supported.

    Returns:
      The codes, scales and zeros; factors for float8 metadata.

    Raises:
      ValueError: for a wrong axis or sizes that do not divide.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    check(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype)
    if factor_block not in (None, group_size):
        raise NotImplementedError(f"factor_block={factor_block}: the {_KERNEL} supports the group size, {group_size}")
    hopper.check_available()
    return launch(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype)


def check(x: jax.Array, *, bits: int, group_size: int, axis: str, metadata_dtype: str) -> None:
    """Refuses what the kernel does not support, from shapes and dtypes.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for a wrong axis or sizes that do not divide.
    """
    if axis not in ("tokens", "channels"):
        raise ValueError(f"axis={axis!r}: expected 'tokens' or 'channels'")
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: expected [B, K, S, H]")
    check_supported(
        _KERNEL,
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata_dtype", metadata_dtype, METADATA_DTYPES),
        ("x.dtype", x.dtype.name, DTYPES),
        ("head_dim", x.shape[3], HEAD_DIMS),
    )
    _, _, tokens, head_dim = x.shape
    unit = group_size if axis == "tokens" or metadata_dtype == "float8_e4m3fn" else 32 // bits
    if tokens % unit or (axis == "channels" and head_dim % group_size):
        raise ValueError(
            f"x has shape {x.shape}: expected a multiple of {unit} tokens and whole groups of {group_size}"
        )


# Jitted, so that it is lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("bits", "group_size", "axis", "metadata_dtype"))
def launch(x: jax.Array, *, bits: int, group_size: int, axis: str, metadata_dtype: str) -> Packed:
    """`quantize` without its checks."""
    batch, kv_heads, tokens, head_dim = x.shape
    groups = head_dim // group_size
    by_tokens, has_factors = axis == "tokens", metadata_dtype == "float8_e4m3fn"
    per_word = 32 // bits
    unit = group_size if by_tokens or has_factors else per_word  # tokens per row
    count = batch * kv_heads * tokens // unit
    vector = _THREAD_CHANNELS
    if by_tokens and group_size == _MAX_GROUP_IN_REGISTERS:
        vector //= 2
    rows = _WARPS * _LANES * vector // head_dim  # per warpgroup
    padded = max(count, rows)
    pad = [(0, padded - count), (0, 0)]
    if by_tokens:
        body, inner, metadata = _keys_kernel, (head_dim,), (head_dim,)
    else:
        # Mosaic GPU cannot reduce over an axis of one.
        body, inner = _values_kernel, (groups, group_size) if groups > 1 else (group_size,)
        metadata = (unit, *inner[:-1])
    out = (
        jax.ShapeDtypeStruct((padded, unit // per_word, *inner), jnp.uint32),
        *[jax.ShapeDtypeStruct((padded, *metadata), jnp.dtype(metadata_dtype))] * 2,
        *[jax.ShapeDtypeStruct((padded,), jnp.float32)] * (2 if has_factors else 0),
    )
    kernel = plgpu.kernel(
        functools.partial(body, bits=bits, rows=rows, layout=_layout(vector, rows, *inner)),
        out_type=out,
        grid=(-(-padded // rows),),
        grid_names=("tile",),
        # Warps share nothing, and every rounding is one of the definition's.
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
    )
    parts = kernel(jnp.pad(x.reshape(count, unit * head_dim), pad).reshape(padded, unit, *inner))
    columns = (head_dim, *[head_dim if by_tokens else groups] * 2, 1, 1)
    words, scale, zero, *factors = (
        part[:count].reshape(batch, kv_heads, -1, n) for part, n in zip(parts, columns, strict=False)
    )
    return Packed((words,), scale, zero, (factors[0], factors[1]) if has_factors else None)


def _layout(vector: int, rows: int, *inner: int) -> Any:
    """Layout of one token of each of a warpgroup's rows: a warp has whole rows, a thread neighbouring channels."""
    *groups, channels = inner
    lanes = (("row", rows // _WARPS), *(("group", n) for n in groups), ("lane", channels // vector))
    dimensions = (("warp", _WARPS), lanes[0]), *((group,) for group in lanes[1:-1]), (lanes[-1], ("element", vector))
    return fragments.layout(*dimensions, lanes=[factor for factor in lanes if factor[1] > 1])


def _tile(rows: int, count: int) -> Any:
    """The rows of a warpgroup; the last tile is moved back to end with the array, and repeats rows before it."""
    return pl.ds(jnp.minimum(lax.axis_index("tile") * rows, count - rows), rows)


def _keys_kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, *factors_gmem, bits: int, rows: int, layout: Any) -> None:
    """Reads x `[R, g, H]` -> words `[R, g * bits / 32, H]`, scale and zero `[R, H]`, their factors `[R]`."""
    count, group_size, head_dim = x_gmem.shape
    tile, per_word = _tile(rows, count), 32 // bits

    words = group_size // per_word

    def load(word: Any) -> list[jax.Array]:
        return [hopper.load(x_gmem.at[tile, word * per_word + j], layout) for j in range(per_word)]

    def widen(bounds: tuple[jax.Array, jax.Array], tokens: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        wide = [x.astype(jnp.float32) for x in tokens]
        return functools.reduce(jnp.minimum, wide, bounds[0]), functools.reduce(jnp.maximum, wide, bounds[1])

    start = plgpu.layout_cast(jnp.full((rows, head_dim), jnp.inf, jnp.float32), layout)
    loaded = [load(word) for word in range(words)] if group_size <= _MAX_GROUP_IN_REGISTERS else []
    if loaded:
        low, high = functools.reduce(widen, loaded, (start, -start))
    else:
        low, high = lax.fori_loop(0, words, lambda word, bounds: widen(bounds, load(word)), (start, -start))
    exact = _step(low, high, bits), low
    factors = [_factor(_magnitude(x), gmem, tile, layout) for x, gmem in zip(exact, factors_gmem, strict=False)]
    scale, zero = (
        _store(x, gmem, (tile,), factor, layout)
        for x, gmem, factor in zip(exact, (scale_gmem, zero_gmem), factors or (None, None), strict=True)
    )
    inverse = _reciprocal(scale, layout)

    def pack(word: Any, tokens: list[jax.Array]) -> None:
        codes = [_code(x.astype(jnp.float32), zero, inverse, bits) for x in tokens]
        words_gmem[tile, word] = _pack(codes, bits)

    for word, tokens in enumerate(loaded):
        pack(word, tokens)
    if not loaded:
        pl.loop(0, words)(lambda word: pack(word, load(word)))


def _values_kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, *factors_gmem, bits: int, rows: int, layout: Any) -> None:
    """Reads x `[R, T, H / g, g]` -> words `[R, T * bits / 32, H / g, g]`, scale and zero `[R, T, H / g]`, factors.

    The `T` tokens of a row are those of a word or, with float8 metadata, of a packing block, whose factors are `[R]`.
    An axis of one group is left out.
    """
    count, tokens, *inner = x_gmem.shape
    tile, per_word = _tile(rows, count), 32 // bits
    last = len(inner)
    reduced = layout.reduce(last)

    def load(word: jax.Array) -> list[jax.Array]:
        return [hopper.load(x_gmem.at[tile, word * per_word + j], layout) for j in range(per_word)]

    def exact(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        low = x.min(axis=last)
        return _step(low, x.max(axis=last), bits), low

    def widen(word: jax.Array, largest: list[jax.Array]) -> list[jax.Array]:
        for x in load(word):
            largest = [
                jnp.maximum(y, _magnitude(z)) for y, z in zip(largest, exact(x.astype(jnp.float32)), strict=True)
            ]
        return largest

    factors: list[Any] = [None, None]
    if factors_gmem:
        start = plgpu.layout_cast(jnp.zeros((rows, *inner[:-1]), jnp.float32), reduced)
        largest = lax.fori_loop(0, tokens // per_word, widen, [start, start])
        factors = [_factor(x, gmem, tile, reduced) for x, gmem in zip(largest, factors_gmem, strict=True)]

    @pl.loop(0, tokens // per_word)
    def _(word):
        codes = []
        for j, x in enumerate(load(word)):
            x = x.astype(jnp.float32)
            scale, zero = (
                _store(y, gmem, (tile, word * per_word + j), factor, reduced)
                for y, gmem, factor in zip(exact(x), (scale_gmem, zero_gmem), factors, strict=True)
            )
            zero, inverse = (_spread(y, x.shape, layout) for y in (zero, _reciprocal(scale, reduced)))
            codes.append(_code(x, zero, inverse, bits))
        words_gmem[tile, word] = _pack(codes, bits)


def _spread(x: jax.Array, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Broadcasts `x`, whose axes are the leading ones of `shape`, over the others."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, range(x.ndim)), layout)


def _step(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    return (high - low) * (np.float32(1) / np.float32(2**bits - 1))


def _magnitude(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -x)


def _factor(largest: jax.Array, gmem: Any, tile: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Writes the factors of rows of float8 metadata whose magnitudes go up to `largest`, `[R]` or `[R, n]`.

    Returns:
      The factors and their reciprocals, in the shape of `largest`.
    """
    row_largest, row_layout = largest, layout
    if largest.ndim > 1:
        row_largest, row_layout = largest.max(axis=1), layout.reduce(1)
    gmem[tile] = factor = row_largest * np.float32(1 / _FLOAT8_MAX)
    inverse = _reciprocal(factor, row_layout)
    return _spread(factor, largest.shape, layout), _spread(inverse, largest.shape, layout)


def _store(
    x: jax.Array, gmem: Any, index: tuple[Any, ...], factor: tuple[jax.Array, jax.Array] | None, layout: Any
) -> jax.Array:
    """Writes metadata, rounded to their dtype, and returns their stored values in float32."""
    if factor is None:
        limit = float(jnp.finfo(gmem.dtype).max)
        gmem[index] = stored = jnp.clip(x, -limit, limit).astype(gmem.dtype)
        return stored.astype(jnp.float32)
    value, inverse = factor
    gmem[index] = stored = (x * inverse).astype(gmem.dtype)
    return _rounded("mul.rn.f32", layout, stored.astype(jnp.float32), value)


def _reciprocal(x: jax.Array, layout: Any) -> jax.Array:
    """`1 / x` rounded once, and 0 where x is 0 or subnormal."""
    return jnp.where(x >= float(jnp.finfo(jnp.float32).tiny), _rounded("rcp.rn.f32", layout, x), 0.0)


def _rounded(instruction: str, layout: Any, *arrays: jax.Array) -> jax.Array:
    """Applies a PTX instruction elementwise to float32 arrays in one layout."""
    result = plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.float32, layout=layout)

    def apply(ctx: Any, *arrays: Any) -> Any:
        del ctx
        return fragments.elementwise(instruction, *arrays)

    return plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=result)(apply)(*arrays)


def _code(x: jax.Array, zero: jax.Array, inverse: jax.Array, bits: int) -> jax.Array:
    """The codes, in the lowest bits. Clipping before rounding is equivalent, because the bounds are whole numbers."""
    step = jnp.clip((x - zero) * inverse, 0.0, float(2**bits - 1))
    return lax.bitcast_convert_type(step + _ROUNDER, jnp.uint32) & jnp.uint32(2**bits - 1)


def _pack(codes: list[jax.Array], bits: int) -> jax.Array:
    """Packs one code per token into words, the first token lowest."""
    return functools.reduce(lambda word, code: (word << jnp.uint32(bits)) | code, reversed(codes))
