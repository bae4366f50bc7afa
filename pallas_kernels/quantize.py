"""Group-wise quantisation and packing of keys and values in one pass over memory.

A warpgroup owns a few rows of words, or of groups where those are longer, over all channels. A thread holds eight or
four channels of a row and walks along the row's tokens, so words are put together without exchanging anything. Keys'
groups lie along the tokens, within a thread; values' groups lie along the channels and take a few shuffles a token.
With 8-bit metadata a row is a packing block, so that its factors take a few shuffles too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fragments, hopper

BITS = (2, 4)
GROUP_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
DTYPES = ("float32", "bfloat16", "float16")
_WARPS = 4
_LANES = 32
_VECTOR = 8  # channels of a thread, or half of them
_FLOAT8_MAX = 448
_HELD = 32  # tokens: registers hold keys' groups of up to as many, so that they are read once
_ROUNDER = 2.0**23  # adding it leaves a float32's integer part, rounded half to even, in the lowest bits

# Planes, scale, zero, and the factors of 8-bit metadata.
Packed = tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def quantize(
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    axis: str,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
) -> Packed:
    """Codes, scales and zeros of `x`, bit for bit as `docs/architecture.md` defines them.

    Args:
      x: `[B, K, S, H]`, float32, bfloat16 or float16; `S` fills whole groups and words.
      bits: 2 or 4.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token.
      metadata_dtype: "float16", "bfloat16" or "float8_e4m3fn".
      factor_block: tokens that share a factor of 8-bit metadata; only `group_size`, the default, is supported.

    Returns:
      `(planes, scale, zero, scale_factor, zero_factor)`: uint32 `[B, K, S * bits / 32, H]`; twice `[B, K, S / g, H]` or
      `[B, K, S, H / g]`; and for 8-bit metadata twice float32 `[B, K, S / g, 1]`, else None.

    Raises:
      ValueError: for a wrong axis or sizes that do not divide.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    check(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype)
    if factor_block not in (None, group_size):
        raise NotImplementedError(
            f"factor_block={factor_block}: the Pallas quantisation kernel supports the group size, {group_size}"
        )
    reason = hopper.why_unavailable()
    if reason:
        raise NotImplementedError(reason)
    return launch(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype)


def check(x: jax.Array, *, bits: int, group_size: int, axis: str, metadata_dtype: str) -> None:
    """Refuses what the kernels do not cover; looks at shapes and dtypes alone.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for a wrong axis or sizes that do not divide.
    """
    if axis not in ("tokens", "channels"):
        raise ValueError(f"axis={axis!r}: expected 'tokens' or 'channels'")
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: expected [B, K, S, H]")
    supported: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata_dtype", metadata_dtype, METADATA_DTYPES),
        ("x.dtype", x.dtype.name, DTYPES),
        ("head_dim", x.shape[3], HEAD_DIMS),
    )
    for name, value, values in supported:
        if value not in values:
            raise NotImplementedError(
                f"{name}={value}: the Pallas quantisation kernel supports {', '.join(map(str, values))}"
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
    unit = group_size if by_tokens or has_factors else per_word  # tokens of a row
    count = batch * kv_heads * tokens // unit
    vector = _VECTOR // 2 if by_tokens and group_size == _HELD else _VECTOR
    rows = _WARPS * _LANES * vector // head_dim  # of a warpgroup
    padded = max(count, rows)
    pad = [(0, padded - count), (0, 0)]
    if by_tokens:
        body, inner, metadata = _keys_kernel, (head_dim,), (head_dim,)
    else:
        # Reductions over an axis of one are not known.
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
        # Warps share nothing. Nothing is to be rounded but as the definition says.
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
    )
    parts = kernel(jnp.pad(x.reshape(count, unit * head_dim), pad).reshape(padded, unit, *inner))
    columns = (head_dim, *[head_dim if by_tokens else groups] * 2, 1, 1)
    words, scale, zero, *factors = (
        part[:count].reshape(batch, kv_heads, -1, n) for part, n in zip(parts, columns, strict=False)
    )
    scale_factor, zero_factor = factors or (None, None)
    return (words,), scale, zero, scale_factor, zero_factor


def _layout(vector: int, rows: int, *inner: int) -> Any:
    """Of a warpgroup's rows of one token each: a warp has whole rows, a thread neighbouring channels."""
    *groups, channels = inner
    lanes = (("row", rows // _WARPS), *(("group", n) for n in groups), ("lane", channels // vector))
    dimensions = (("warp", _WARPS), lanes[0]), *((group,) for group in lanes[1:-1]), (lanes[-1], ("element", vector))
    return fragments.layout(*dimensions, lanes=[factor for factor in lanes if factor[1] > 1])


def _tile(rows: int, count: int) -> Any:
    """The rows of a warpgroup; the last tile is moved back to end with the array, and repeats what it finds there."""
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
    held = [load(word) for word in range(words)] if group_size <= _HELD else []
    if held:
        low, high = functools.reduce(widen, held, (start, -start))
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

    for word, tokens in enumerate(held):
        pack(word, tokens)
    if not held:
        pl.loop(0, words)(lambda word: pack(word, load(word)))


def _values_kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, *factors_gmem, bits: int, rows: int, layout: Any) -> None:
    """Reads x `[R, T, H / g, g]` -> words `[R, T * bits / 32, H / g, g]`, scale and zero `[R, T, H / g]`, factors.

    The `T` tokens of a row are those of a word or, with 8-bit metadata, of a packing block, whose factors are `[R]`. An
    axis of one group is left out.
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
    """`x`, all of whose axes lead, over the axes that it lacks."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, range(x.ndim)), layout)


def _step(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
    return (high - low) * (np.float32(1) / np.float32(2**bits - 1))


def _magnitude(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -x)


def _factor(largest: jax.Array, gmem: Any, tile: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Writes the factors of rows of 8-bit metadata, of magnitudes up to `largest` `[R]` or `[R, n]`.

    Returns:
      The factors and their reciprocals, in the shape of `largest`.
    """
    of_rows, whole = largest, layout
    if largest.ndim > 1:
        of_rows, layout = largest.max(axis=1), layout.reduce(1)
    gmem[tile] = factor = of_rows * np.float32(1 / _FLOAT8_MAX)
    inverse = _reciprocal(factor, layout)
    return _spread(factor, largest.shape, whole), _spread(inverse, largest.shape, whole)


def _store(
    x: jax.Array, gmem: Any, index: tuple[Any, ...], factor: tuple[jax.Array, jax.Array] | None, layout: Any
) -> jax.Array:
    """Writes metadata, rounded to their dtype, and says what they then stand for."""
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
    """Of float32 arrays, elementwise."""
    result = plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.float32, layout=layout)

    def apply(ctx: Any, *arrays: Any) -> Any:
        del ctx
        return fragments.elementwise(instruction, *arrays)

    return plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=result)(apply)(*arrays)


def _code(x: jax.Array, zero: jax.Array, inverse: jax.Array, bits: int) -> jax.Array:
    """The code in the lowest bits; clipping to whole numbers first rounds to the same."""
    step = jnp.clip((x - zero) * inverse, 0.0, float(2**bits - 1))
    return lax.bitcast_convert_type(step + _ROUNDER, jnp.uint32) & jnp.uint32(2**bits - 1)


def _pack(codes: list[jax.Array], bits: int) -> jax.Array:
    """The first token lies lowest."""
    return functools.reduce(lambda word, code: (word << jnp.uint32(bits)) | code, reversed(codes))
