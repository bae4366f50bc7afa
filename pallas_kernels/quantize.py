"""Group-wise quantisation and packing of keys and values in one pass over memory.

A warpgroup owns a few rows of words, or of groups where those are longer, over all channels. A thread holds eight
channels of a row and walks along the row's tokens, so words are put together without exchanging anything. Keys' groups
lie along the tokens, within a thread; values' groups lie along the channels and take a few shuffles a token.
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

from pallas_kernels import hopper

BITS = (2, 4)
GROUP_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128)
METADATA_DTYPES = ("float16", "bfloat16")
DTYPES = ("float32", "bfloat16", "float16")
_WARPS = 4
_LANES = 32
_VECTOR = 8  # channels of a thread
_ROUNDER = 2.0**23  # adding it leaves a float32's integer part, rounded half to even, in the lowest bits


def quantize(
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    axis: str,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Codes, scales and zeros of `x`, bit for bit as `docs/architecture.md` defines them.

    Args:
      x: `[B, K, S, H]`, float32, bfloat16 or float16; `S` fills whole groups and words.
      bits: 2 or 4.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token.
      metadata_dtype: "float16" or "bfloat16".
      factor_block: None; tokens that share a factor of 8-bit metadata, which this kernel does not write.

    Returns:
      `(planes, scale, zero)`: uint32 `[B, K, S * bits / 32, H]`, and twice `[B, K, S / g, H]` or `[B, K, S, H / g]`.

    Raises:
      ValueError: for a wrong axis or sizes that do not divide.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    check(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype)
    if factor_block is not None:
        raise NotImplementedError(f"factor_block={factor_block}: the Pallas quantisation kernel writes no factors")
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
    grouped = tokens if axis == "tokens" else head_dim
    if tokens % (32 // bits) or grouped % group_size:
        raise ValueError(
            f"x has shape {x.shape}: expected a multiple of {32 // bits} tokens and whole groups of {group_size}"
        )


# Jitted, so that it is lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("bits", "group_size", "axis", "metadata_dtype"))
def launch(
    x: jax.Array, *, bits: int, group_size: int, axis: str, metadata_dtype: str
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """`quantize` without its checks."""
    batch, kv_heads, tokens, head_dim = x.shape
    groups = head_dim // group_size
    by_tokens = axis == "tokens"
    per_word = 32 // bits
    unit = group_size if by_tokens else per_word  # tokens of a row
    count = batch * kv_heads * tokens // unit
    rows = _WARPS * _LANES * _VECTOR // head_dim  # of a warpgroup
    padded = max(count, rows)
    pad = [(0, padded - count), (0, 0)]
    if by_tokens:
        body, inner, layout = _keys_kernel, (head_dim,), _keys_layout(rows, head_dim)
        words, metadata = (unit // per_word, head_dim), (head_dim,)
    else:
        body, inner, layout = _values_kernel, (groups, group_size), _values_layout(rows, groups, group_size)
        words, metadata = (groups, group_size), (unit, groups)
    out = (
        jax.ShapeDtypeStruct((padded, *words), jnp.uint32),
        jax.ShapeDtypeStruct((padded, *metadata), jnp.dtype(metadata_dtype)),
        jax.ShapeDtypeStruct((padded, *metadata), jnp.dtype(metadata_dtype)),
    )
    kernel = plgpu.kernel(
        functools.partial(body, bits=bits, rows=rows, layout=layout),
        out_type=out,
        grid=(-(-padded // rows),),
        grid_names=("tile",),
        # Warps share nothing. Scales are to be divided exactly.
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
    )
    planes, scale, zero = kernel(jnp.pad(x.reshape(count, unit * head_dim), pad).reshape(padded, unit, *inner))
    shape = (batch, kv_heads, -1, head_dim if by_tokens else groups)
    return (
        (planes[:count].reshape(batch, kv_heads, -1, head_dim),),
        scale[:count].reshape(shape),
        zero[:count].reshape(shape),
    )


def _keys_layout(rows: int, head_dim: int) -> Any:
    tiling = plgpu.Tiling(((rows, head_dim), (rows // _WARPS, head_dim), (_VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _values_layout(rows: int, groups: int, group_size: int) -> Any:
    tiling = plgpu.Tiling(((rows, groups, group_size), (rows // _WARPS, groups, group_size), (_VECTOR,)))
    lanes = (-4, -3, -2) if groups > 1 else (-4, -2)
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=lanes, vector_dim=-1)


def _tile(rows: int, count: int) -> Any:
    """The rows of a warpgroup; the last tile is moved back to end with the array, and repeats what it finds there."""
    return pl.ds(jnp.minimum(lax.axis_index("tile") * rows, count - rows), rows)


def _keys_kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, *, bits: int, rows: int, layout: Any) -> None:
    """Reads x `[R, g, H]` -> words `[R, g * bits / 32, H]`, scale and zero `[R, H]`."""
    count, group_size, head_dim = x_gmem.shape
    tile, per_word = _tile(rows, count), 32 // bits

    def load(word: jax.Array) -> list[jax.Array]:
        tokens = (hopper.load(x_gmem.at[tile, word * per_word + j], layout) for j in range(per_word))
        return [x.astype(jnp.float32) for x in tokens]

    def widen(word: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens = load(word)
        return functools.reduce(jnp.minimum, tokens, bounds[0]), functools.reduce(jnp.maximum, tokens, bounds[1])

    start = plgpu.layout_cast(jnp.full((rows, head_dim), jnp.inf, jnp.float32), layout)
    low, high = lax.fori_loop(0, group_size // per_word, widen, (start, -start))
    scale, zero = _metadata(low, high, bits, scale_gmem.dtype)
    scale_gmem[tile], zero_gmem[tile] = scale, zero
    inverse, offset = _inverse(scale), zero.astype(jnp.float32)

    @pl.loop(0, group_size // per_word)
    def _(word):
        words_gmem[tile, word] = _pack([_code(x, offset, inverse, bits) for x in load(word)], bits)


def _values_kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, *, bits: int, rows: int, layout: Any) -> None:
    """Reads x `[R, 32 / bits, H / g, g]` -> words `[R, H / g, g]`, scale and zero `[R, 32 / bits, H / g]`."""
    count, per_word, _, _ = x_gmem.shape
    tile = _tile(rows, count)
    tokens = [hopper.load(x_gmem.at[tile, j], layout) for j in range(per_word)]

    def spread(y: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(y, tokens[0].shape, (0, 1)), layout)

    codes = []
    for j, x in enumerate(tokens):
        x = x.astype(jnp.float32)
        scale, zero = _metadata(x.min(axis=2), x.max(axis=2), bits, scale_gmem.dtype)
        scale_gmem[tile, j], zero_gmem[tile, j] = scale, zero
        inverse, offset = spread(_inverse(scale)), spread(zero.astype(jnp.float32))
        codes.append(_code(x, offset, inverse, bits))
    words_gmem[tile] = _pack(codes, bits)


def _metadata(low: jax.Array, high: jax.Array, bits: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    limit = float(jnp.finfo(dtype).max)
    scale = (high - low) * (np.float32(1) / np.float32(2**bits - 1))
    return jnp.clip(scale, -limit, limit).astype(dtype), jnp.clip(low, -limit, limit).astype(dtype)


def _inverse(scale: jax.Array) -> jax.Array:
    """`1 / scale` rounded once, and 0 where it is 0 or subnormal.

    The division may be off by a unit in the last place; a step of Newton's, whose residual is exact because a scale has
    at most 11 bits and half of the quotient 12, mends that.
    """
    scale = scale.astype(jnp.float32)
    near = 1.0 / scale
    head = lax.bitcast_convert_type(lax.bitcast_convert_type(near, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32)
    residual = (1.0 - scale * head) - scale * (near - head)
    return jnp.where(scale >= float(jnp.finfo(jnp.float32).tiny), near + near * residual, 0.0)


def _code(x: jax.Array, zero: jax.Array, inverse: jax.Array, bits: int) -> jax.Array:
    """The code in the lowest bits; clipping to whole numbers first rounds to the same."""
    step = jnp.clip((x - zero) * inverse, 0.0, float(2**bits - 1))
    return lax.bitcast_convert_type(step + _ROUNDER, jnp.uint32) & jnp.uint32(2**bits - 1)


def _pack(codes: list[jax.Array], bits: int) -> jax.Array:
    """The first token lies lowest."""
    return functools.reduce(lambda word, code: (word << jnp.uint32(bits)) | code, reversed(codes))
