"""The packed layout in NumPy: the definition that library and kernels are tested against.

It follows docs/packed-layout.md, one group and one token at a time, for arrays of `S` tokens with `H` channels and any
leading axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code -> bits in each plane
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float32": np.dtype(np.float32),
}
SMALLEST = np.finfo(np.float32).tiny  # reciprocals of smaller numbers overflow


def packing_block(bits: int, group_size: int) -> int:
    """Smallest number of tokens that fills whole groups and whole words."""
    return max(group_size, 32 // min(PLANES[bits]))


def pack(codes: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """Packs codes `[..., S, H]` as uint32 words `[..., S * p / 32, H]` for each plane of p bits."""
    *lead, tokens, channels = codes.shape
    planes, low = [], 0
    for p in PLANES[bits]:
        per_word = 32 // p
        words = np.zeros((*lead, tokens // per_word, channels), np.uint32)
        for s in range(tokens):
            piece = (codes[..., s, :].astype(np.uint32) >> np.uint32(low)) & np.uint32(2**p - 1)
            words[..., s // per_word, :] |= piece << np.uint32(s % per_word * p)
        planes.append(words)
        low += p
    return tuple(planes)


def unpack(planes: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """Unpacks the words of `pack` to int64 codes `[..., S, H]`."""
    *lead, words, channels = planes[0].shape
    tokens = words * (32 // PLANES[bits][0])
    codes = np.zeros((*lead, tokens, channels), np.int64)
    for s in range(tokens):
        low = 0
        for p, plane in zip(PLANES[bits], planes, strict=True):
            per_word = 32 // p
            piece = (plane[..., s // per_word, :] >> np.uint32(s % per_word * p)) & np.uint32(2**p - 1)
            codes[..., s, :] |= piece.astype(np.int64) << low
            low += p
    return codes


@dataclasses.dataclass
class Metadata:
    """Scales or zeros, as stored and as float32 values.

    Attributes:
      stored: `[..., S / g, H]` (axis "tokens") or `[..., S, H / g]` (axis "channels").
      value: the same in float32, multiplied by the factors.
      factor: `[..., S / Q, 1]`, with float8 metadata only.
    """

    stored: np.ndarray
    value: np.ndarray
    factor: np.ndarray | None


@dataclasses.dataclass
class Packed:
    """Quantised keys or values with their metadata.

    Attributes:
      codes: `[..., S, H]`.
      steps: the codes before rounding, float32.
      scale, zero: scales and zeros of the groups.
    """

    codes: np.ndarray
    steps: np.ndarray
    scale: Metadata
    zero: Metadata
    bits: int
    group_size: int
    axis: str

    @property
    def planes(self) -> tuple[np.ndarray, ...]:
        return pack(self.codes, self.bits)

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.scale.factor is None or self.zero.factor is None:
            return None
        return self.scale.factor, self.zero.factor

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Lists the stored arrays: planes, scale, zero and, with float8 metadata, the two factors."""
        return (*self.planes, self.scale.stored, self.zero.stored, *(self.factors or ()))

    def adopt(self, codes: np.ndarray) -> bool:
        """Tells whether `codes` equal these codes; ties from float8 metadata may differ, and are adopted.

        The compiler may round `x - scale_f8 * factor` once or twice, except with 16-bit metadata.
        """
        differ = codes != self.codes
        if differ.any() and self.factors is not None:
            # Off by 2**-24 of the zero, which is at most some 255 steps: 1e-4 of a step has a margin of a few.
            tie = np.abs(self.steps - np.floor(self.steps) - 0.5) < 1e-4
            differ &= ~tie | (np.abs(codes.astype(np.int64) - self.codes) > 1)
            self.codes = np.where(differ, self.codes, codes)
        return not differ.any()

    def dequantize(self) -> np.ndarray:
        """Dequantises to float32 `[..., S, H]`."""
        axis = -2 if self.axis == "tokens" else -1
        scale, zero = (np.repeat(x.value, self.group_size, axis) for x in (self.scale, self.zero))
        return self.codes.astype(np.float32) * scale + zero


def quantize(
    x: np.ndarray,
    bits: int,
    group_size: int,
    axis: str,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
) -> Packed:
    """Quantises x `[..., S, H]` in float32; `factor_block` tokens (default: a packing block) share a factor."""
    x = x.astype(np.float32)
    along = -2 if axis == "tokens" else -1
    groups = x.shape[along] // group_size
    shape = list(x.shape)
    shape[along] = groups
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def part(array: np.ndarray, first: int, count: int) -> np.ndarray:
        taken = slice(first, first + count)
        return array[..., taken, :] if axis == "tokens" else array[..., taken]

    for i in range(groups):
        group = part(x, i * group_size, group_size)
        part(low, i, 1)[...] = group.min(along, keepdims=True)
        part(high, i, 1)[...] = group.max(along, keepdims=True)
    levels = np.float32(2**bits - 1)
    block = factor_block or packing_block(bits, group_size)
    scale = store((high - low) * (np.float32(1) / levels), metadata_dtype, x.shape[-2] // block)
    zero = store(low, metadata_dtype, x.shape[-2] // block)
    inverse = reciprocal(scale.value)
    steps = np.zeros_like(x)
    for i in range(groups):
        difference = part(x, i * group_size, group_size) - part(zero.value, i, 1)
        part(steps, i * group_size, group_size)[...] = difference * part(inverse, i, 1)
    codes = np.clip(np.rint(steps), 0, levels).astype(np.int64)
    return Packed(codes, steps, scale, zero, bits, group_size, axis)


def store(x: np.ndarray, metadata_dtype: str, blocks: int) -> Metadata:
    """Rounds scales or zeros `[..., rows, columns]` of `blocks` blocks of tokens to their dtype."""
    dtype = DTYPES[metadata_dtype]
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    if metadata_dtype != "float8_e4m3fn":
        stored = np.clip(x, -largest, largest).astype(dtype)
        return Metadata(stored, stored.astype(np.float32), None)
    by_block = x.reshape(*x.shape[:-2], blocks, -1)
    factor = np.abs(by_block).max(-1, keepdims=True) * np.float32(1 / float(largest))
    stored = (by_block * reciprocal(factor)).astype(dtype)
    return Metadata(stored.reshape(x.shape), (stored.astype(np.float32) * factor).reshape(x.shape), factor)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """Computes `1 / x` rounded once, or 0 if x is 0 or subnormal."""
    normal = x >= SMALLEST
    return np.where(normal, np.float32(1) / np.where(normal, x, np.float32(1)), np.float32(0))
