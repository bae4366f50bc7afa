"""Argument types of the kernels, and their shared checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

PLANES = {2: (2,), 3: (2, 1), 4: (4,)}  # bits of a code -> widths of its bit planes
BITS = tuple(PLANES)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")

Stored = TypeVar("Stored")


class Packed(NamedTuple):
    """Keys or values of `S` tokens in few bits, laid out as in `docs/packed-layout.md`.

    A group of size `g` shares a scale and a zero: `g` consecutive tokens of one channel (keys) or `g` consecutive
    channels of one token (values).

    Attributes:
      planes: code words, uint32 `[B, K, S * p / 32, H]` for each bit plane of `p` bits (`PLANES`).
      scale: distance between two codes, `[B, K, S / g, H]` (keys) or `[B, K, S, H / g]` (values), in float16, bfloat16
        or float8_e4m3fn.
      zero: value of code 0; shape and dtype of `scale`.
      factors: (scale factor, zero factor), by which float8 metadata are multiplied, each float32 `[B, K, S / Q, 1]`
        for `Q` tokens per factor. None for the other dtypes.
    """

    planes: tuple[UInt32[Array, "B K words H"], ...]
    scale: Float[Array, "B K rows columns"]
    zero: Float[Array, "B K rows columns"]
    factors: tuple[Float32[Array, "B K blocks 1"], Float32[Array, "B K blocks 1"]] | None = None


class Region(NamedTuple, Generic[Stored]):
    """One of the two parts of a layer's cache.

    Attributes:
      k, v: `Packed` of capacity `P` (the packed region), or arrays `[B, K, C, H]` (the full-precision tail).
      length: int32 `[B]`, valid tokens per row; slots beyond it may hold anything.
    """

    k: Stored
    v: Stored
    length: Int32[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a packed region is stored.

    Attributes:
      k_bits, v_bits: bits per code of keys and of values.
      group_size: values per scale and zero.
    """

    k_bits: int
    v_bits: int
    group_size: int

    @property
    def packing_block(self) -> int:
        """Smallest number of tokens that fills whole groups and words of keys and of values."""
        return max(packing_block(bits, self.group_size) for bits in (self.k_bits, self.v_bits))


def packing_block(bits: int, group_size: int) -> int:
    """Smallest number of tokens that fills whole groups and words of every plane."""
    return max(group_size, 32 // min(PLANES[bits]))


def check_supported(kernel: str, *cases: tuple[str, Any, Sequence[Any]]) -> None:
    """Checks `(name, value, supported values)` one by one.

    Raises:
      NotImplementedError: naming the kernel, the value and what is supported.
    """
    for name, value, supported in cases:
        if value not in supported:
            raise NotImplementedError(f"{name}={value}: the {kernel} supports {', '.join(map(str, supported))}")


def check_packed(kernel: str, packed: Region[Packed], storage: Storage, bits: Sequence[int] = BITS) -> None:
    """Checks the bits, the planes, the group size and the dtypes of a packed region.

    Args:
      kernel: its name.
      packed: keys and values.
      storage: how they are stored.
      bits: supported bits per code.

    Raises:
      NotImplementedError: naming the kernel, the value and what is supported.
      ValueError: for arrays that do not match.
    """
    metadata_dtype = packed.k.scale.dtype
    check_supported(
        kernel,
        ("k_bits", storage.k_bits, bits),
        ("v_bits", storage.v_bits, bits),
        ("group_size", storage.group_size, GROUP_SIZES),
        ("metadata dtype", metadata_dtype.name, METADATA_DTYPES),
    )
    for name, side, side_bits in (("k", packed.k, storage.k_bits), ("v", packed.v, storage.v_bits)):
        planes = len(PLANES[side_bits])
        if len(side.planes) != planes:
            raise ValueError(f"packed.{name} has {len(side.planes)} planes: expected {planes} for {side_bits} bits")
        if side.scale.dtype != metadata_dtype or side.zero.dtype != metadata_dtype:
            raise ValueError(
                f"packed.{name} has metadata of dtypes {side.scale.dtype} and {side.zero.dtype}: "
                f"expected one dtype for keys and values, {metadata_dtype}"
            )
        if (side.factors is not None) != (metadata_dtype == jnp.float8_e4m3fn):
            raise ValueError(
                f"packed.{name} has {'no ' if side.factors is None else ''}factors with {metadata_dtype} metadata: "
                "expected with float8_e4m3fn only"
            )
