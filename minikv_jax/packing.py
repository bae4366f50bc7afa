"""Group-wise asymmetric quantisation and true bit packing (MiniKV section 3.2, KIVI section 3).

Keys are quantised per channel in groups of consecutive tokens ("sub-channel"), values per token in groups of
consecutive channels. `docs/packed-layout.md` specifies the packed layout, which is the same for keys, values and every
number of bits: a 32-bit word holds consecutive tokens of one channel.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from minikv_jax import fields
from minikv_jax.arrays import resolve_dtype
from minikv_jax.fields import setting

Axis = Literal["tokens", "channels"]

BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # widths of the bit planes that hold a code
MAX_BLOCK = 1024  # tokens read at a time from a packed region; a multiple of every packing block

_FLOAT8_MAX = 448.0  # largest finite float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Packing:
    """Quantisation and packing of an array `[..., S, H]` (MiniKV section 3.2, KIVI section 3).

    Attributes:
      bits: bits per code: 1, 2, 3, 4 or 8.
      group_size: number of values that share a scale and a zero point: 16, 32, 64 or 128.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token
        (values).
      metadata_dtype: dtype of scales and zero points: "float16", "bfloat16" or "float8_e4m3fn".
      factor_block: tokens that share a float32 factor of 8-bit metadata; by default the fewest that fill whole groups
        and words.

    Raises:
      ValueError: a value that is not accepted, or a `factor_block` that does not fill whole groups and words.
    """

    bits: int = setting(kind=int, choices=BITS)
    group_size: int = setting(kind=int, choices=GROUP_SIZES)
    axis: Axis = setting(kind=str, choices=("tokens", "channels"))
    metadata_dtype: str = setting(default="float16", choices=METADATA_DTYPES)
    factor_block: int | None = setting(default=None, kind=int, at_least=1, at_most=MAX_BLOCK)

    def __post_init__(self) -> None:
        fields.check(self)
        if self.factor_block is not None and self.factor_block % self.unit:
            raise ValueError(
                f"factor_block={self.factor_block}: expected a multiple of {self.unit}, whole groups and words"
            )

    @property
    def word_tokens(self) -> int:
        """Number of tokens in a word of the narrowest plane."""
        return 32 // min(PLANES[self.bits])

    @property
    def unit(self) -> int:
        """Smallest number of tokens that fills whole groups and words."""
        return max(self.group_size if self.axis == "tokens" else 1, self.word_tokens)

    @property
    def block(self) -> int:
        """Number of tokens that share a factor of 8-bit metadata."""
        return self.factor_block or max(self.group_size, self.word_tokens)

    @property
    def has_factors(self) -> bool:
        """Whether metadata have a second level: a float32 factor for each block of tokens."""
        return self.metadata_dtype == "float8_e4m3fn"

    @property
    def reduced(self) -> int:
        """Axis of `grouped` arrays that runs over the values of a group."""
        return -2 if self.axis == "tokens" else -1

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless arrays of `shape` fill whole groups and words."""
        tokens, channels = shape[-2:]
        unit = self.block if self.has_factors else self.unit
        if tokens % unit:
            raise ValueError(f"{tokens} tokens do not fill whole groups and words: expected a multiple of {unit}")
        if self.axis == "channels" and channels % self.group_size:
            raise ValueError(f"head_dim {channels} is not divisible by group_size {self.group_size}")


class TokenRows:
    """Base of the arrays in a cache's packed region: a run of tokens is a run of rows.

    A subclass is a pytree. In each leaf, one axis holds `num_tokens / r` rows of `r` tokens; `r` may differ by leaf.
    """

    @property
    def num_tokens(self) -> int:
        """`S`, the token capacity."""
        raise NotImplementedError

    def _axis(self, leaf: Array) -> int:
        raise NotImplementedError

    def _resized(self, size: int) -> Self:
        """Returns the value after its leaves have changed to `size` tokens."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Allocated bytes, codes and metadata together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def tokens(self, start: int | Array, size: int) -> Self:
        """Cuts out `size` tokens from `start` on. Both must be multiples of the packing block."""
        total = self.num_tokens

        def rows(leaf: Array) -> Array:
            axis = self._axis(leaf)
            ratio = total // leaf.shape[axis]
            return lax.dynamic_slice_in_dim(leaf, start // ratio, size // ratio, axis)

        return jax.tree.map(rows, self)._resized(size)

    def write(self, block: TokenRows, start: Array, where: Array) -> Self:
        """Writes `block` into the rows that `where` selects. Other rows stay as they are.

        Args:
          block: the tokens to write; leading axes are `[B, K]`.
          start: int32 `[B]`, the token of each row to write at, a multiple of the packing block.
          where: bool `[B]`.
        """
        total = self.num_tokens

        def write_row(old: Array, new: Array, first: Array) -> Array:
            window = lax.ScatterDimensionNumbers(tuple(range(new.ndim)), (), (1,))
            return lax.scatter(
                old,
                first[None],
                new,
                window,
                unique_indices=True,
                indices_are_sorted=True,
                mode=lax.GatherScatterMode.FILL_OR_DROP,
            )

        def write_leaf(old: Array, new: Array) -> Array:
            # Rows that are not chosen write past the end, which does nothing. A select of whole arrays would copy them.
            first = jnp.where(where, lax.div(start, total // old.shape[2]), old.shape[2])
            return jax.vmap(write_row)(old, new, first)

        return jax.tree.map(write_leaf, self, block._resized(total))

    def pad_tokens(self, size: int) -> Self:
        """Extends the token capacity to `size` (a multiple of the packing block) with zeros."""
        total = self.num_tokens

        def pad(leaf: Array) -> Array:
            widths = [(0, 0)] * leaf.ndim
            axis = self._axis(leaf)
            widths[axis] = (0, size // (total // leaf.shape[axis]) - leaf.shape[axis])
            return jnp.pad(leaf, widths)

        return jax.tree.map(pad, self)._resized(size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredArray(TokenRows):
    """Stored tokens of a quantizer with a layout of its own (`methods.Quantizer`): arrays `[B, K, S / r, ...]`."""

    arrays: Any
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        return self.size

    def _axis(self, leaf: Array) -> int:
        return 2

    def _resized(self, size: int) -> Self:
        return dataclasses.replace(self, size=size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray(TokenRows):
    """Packed codes, scales and zero points of `S` tokens and `H` channels: `x ~= code * scale + zero` (KIVI eq. 1).

    `quantize` makes one and `dequantize` reads it. The token axis of every array is the last but one, so a run of
    tokens is a run of rows (`docs/packed-layout.md`).

    Attributes:
      planes: uint32 `[..., S * p / 32, H]`, one array per bit plane of `p` bits (`PLANES`).
      scale, zero: `[..., S / g, H]` for `axis="tokens"`, `[..., S, H / g]` for `axis="channels"`, `g` being the group
        size; float16, bfloat16 or float8_e4m3fn.
      scale_factor, zero_factor: float32 `[..., S / block, 1]`, the second level of 8-bit metadata, else None.
      packing: the bits, groups and dtypes of the arrays.
    """

    planes: tuple[UInt32[Array, "... W H"], ...]
    scale: Array
    zero: Array
    scale_factor: Float[Array, "... R 1"] | None
    zero_factor: Float[Array, "... R 1"] | None
    packing: Packing = dataclasses.field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        """`S`, the token capacity."""
        return self.planes[0].shape[-2] * 32 // PLANES[self.packing.bits][0]

    def _axis(self, leaf: Array) -> int:
        return leaf.ndim - 2

    def _resized(self, size: int) -> Self:
        del size  # the planes' shape determines it
        return self


def pack(codes: UInt32[Array, "... S H"], bits: int) -> tuple[UInt32[Array, "... W H"], ...]:
    """Packs codes in `0..2**bits - 1` along tokens. `S` must be a multiple of 32 over the narrowest plane's width."""
    planes, low = [], 0
    for width in PLANES[bits]:
        per_word = 32 // width
        *lead, tokens, channels = codes.shape
        part = (codes >> low) & ((1 << width) - 1)
        part = part.reshape(*lead, tokens // per_word, per_word, channels)
        shifts = width * jnp.arange(per_word, dtype=jnp.uint32)
        planes.append(jnp.sum(part << shifts[:, None], axis=-2, dtype=jnp.uint32))  # disjoint bits: sum is or
        low += width
    return tuple(planes)


def unpack(planes: tuple[UInt32[Array, "... W H"], ...], bits: int) -> UInt32[Array, "... S H"]:
    """Unpacks codes that `pack` packed."""
    parts, low = [], 0
    for words, width in zip(planes, PLANES[bits], strict=True):
        per_word = 32 // width
        shifts = width * jnp.arange(per_word, dtype=jnp.uint32)
        part = (words[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)
        parts.append(part.reshape(*words.shape[:-2], -1, words.shape[-1]) << low)
        low += width
    return sum(parts[1:], start=parts[0])


def encode_minmax(x: Float[Array, "... S H"], packing: Packing) -> QuantizedArray:
    """Quantises by asymmetric min/max in groups, and packs (KIVI eq. 1; MiniKV section 3.2).

    Args:
      x: float32, bfloat16 or float16.
      packing: bits, groups and dtypes.

    Returns:
      Codes rounded against the *stored* scale and zero point. A constant group has scale 0 and is restored up to the
      rounding of its zero point.

    Raises:
      ValueError: a size that does not fill whole groups and words.
    """
    packing.check(x.shape)
    return encode(x, *minmax(grouped(x, packing), packing), packing)


def minmax(groups: Float[Array, "..."], packing: Packing) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Smallest value of each group (`grouped`), and the step between its codes; float32."""
    low, high = groups.min(axis=packing.reduced), groups.max(axis=packing.reduced)
    # Multiply by reciprocals, here and below. XLA turns a division by a constant or a broadcast into such a product, or
    # does not, depending on what is compiled together: `/` would give different bits.
    return low, (high - low) * (1 / ((1 << packing.bits) - 1))


def encode(
    x: Float[Array, "... S H"], low: Float[Array, "..."], steps: Float[Array, "..."], packing: Packing
) -> QuantizedArray:
    """Encodes and packs `x` with the given zero point (`low`) and scale (`steps`) per group, rounded to their dtype."""
    groups, tokens = grouped(x, packing), x.shape[-2]
    scale, scale_factor = _store(steps, packing, tokens)
    zero, zero_factor = _store(low, packing, tokens)

    stored_scale = jnp.expand_dims(_restore(scale, scale_factor), packing.reduced)
    stored_zero = jnp.expand_dims(_restore(zero, zero_factor), packing.reduced)
    codes = jnp.clip(jnp.round((groups - stored_zero) * _reciprocal(stored_scale)), 0, (1 << packing.bits) - 1)
    planes = pack(codes.astype(jnp.uint32).reshape(x.shape), packing.bits)
    return QuantizedArray(planes, scale, zero, scale_factor, zero_factor, packing)


def dequantize(x: QuantizedArray, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, "... S H"]:
    """Restores quantised tokens: `code * scale + zero`, computed in float32 and rounded once (KIVI eq. 1).

    Args:
      x: packed codes with their scales and zero points, from `quantize`.
      dtype: floating-point dtype of the result.

    Returns:
      The tokens `[..., S, H]` in `dtype`.

    Raises:
      ValueError: `x` is not a `QuantizedArray`, or `dtype` is not a floating-point dtype.
    """
    if not isinstance(x, QuantizedArray):
        raise ValueError(f"dequantize: x is a {type(x).__name__}: expected a QuantizedArray")
    dtype = resolve_dtype(dtype)
    codes = unpack(x.planes, x.packing.bits).astype(jnp.float32)
    scale = jnp.expand_dims(_restore(x.scale, x.scale_factor), x.packing.reduced)
    zero = jnp.expand_dims(_restore(x.zero, x.zero_factor), x.packing.reduced)
    return (grouped(codes, x.packing) * scale + zero).reshape(codes.shape).astype(dtype)


def grouped(x: Float[Array, "... S H"], packing: Packing) -> Float[Array, "..."]:
    """Splits into float32 groups: `[..., S/g, g, H]` along tokens, `[..., S, H/g, g]` along channels."""
    x = x.astype(jnp.float32)
    *lead, tokens, channels = x.shape
    if packing.axis == "tokens":
        return x.reshape(*lead, tokens // packing.group_size, packing.group_size, channels)
    return x.reshape(*lead, tokens, channels // packing.group_size, packing.group_size)


def _store(x: Array, packing: Packing, tokens: int) -> tuple[Array, Array | None]:
    """Rounds metadata `[..., rows, n]` to its dtype. 8-bit floats are relative to the largest value of their block."""
    if not packing.has_factors:
        limit = float(jnp.finfo(packing.metadata_dtype).max)  # a bfloat16 outlier must not turn into infinity
        return jnp.clip(x, -limit, limit).astype(packing.metadata_dtype), None
    *lead, rows, width = x.shape
    blocks = x.reshape(*lead, tokens // packing.block, rows * packing.block // tokens * width)
    factor = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) * (1 / _FLOAT8_MAX)
    return (blocks * _reciprocal(factor)).astype(jnp.float8_e4m3fn).reshape(x.shape), factor


def _reciprocal(x: Array) -> Array:
    """Computes `1 / x`, or 0 if `x` is 0 or so small (subnormal) that its reciprocal overflows."""
    normal = x >= jnp.finfo(jnp.float32).tiny
    return jnp.where(normal, 1 / jnp.where(normal, x, 1.0), 0.0)


def _restore(x: Array, factor: Array | None) -> Array:
    if factor is None:
        return x.astype(jnp.float32)
    blocks = x.astype(jnp.float32).reshape(*factor.shape[:-1], -1)
    return (blocks * factor).reshape(x.shape)
