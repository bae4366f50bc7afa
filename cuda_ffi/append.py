"""Appends one token per row to a cache in place; a full tail gives its oldest block to the packed region."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from cuda_ffi import registration
from cuda_ffi.arrays import Packed, Region, Storage, check_packed, check_supported
from cuda_ffi.quantize import DTYPES, check_head_dim

_KERNEL = "CUDA append kernel"
# Operands 3 and 4, the lengths, are results 0 and 1; operands 5 to 18, the cache, results 2 to 15.
_ALIASES = {3 + i: i for i in range(16)}


def append(
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    count: Int32[Array, "B"],
    packed: Region[Packed],
    tail: Region[Array],
    *,
    storage: Storage,
    sinks: int,
    block: int,
) -> tuple[Region[Packed], Region[Array]]:
    """Appends each row's token to its tail. A tail that becomes full packs its oldest `block` non-sink tokens.

    The `C - sinks - block` tokens behind the block move down. A row whose tail and packed region are both full takes
    nothing. The arrays of `packed` and `tail` are updated in place if the caller donates them or they are a loop's
    carry.

    Args:
      k, v: `[B, K, H]` in the tail's dtype.
      count: int32 `[B]`, 0 for rows that get no token.
      packed: keys and values of capacity `P`; factors of float8 metadata are for a packing block each.
      tail: keys and values `[B, K, C, H]`, float32, bfloat16 or float16.
      storage: bits and group size of `packed`.
      sinks: leading tail slots that never leave.
      block: tokens packed at once, a multiple of the packing block; `sinks + block <= C`.

    Returns:
      `packed` and `tail` with the tokens appended.

    Raises:
      ValueError: for sizes that do not match.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    _check(packed, tail, storage, sinks, block)
    registration.load()
    cache = (*_arrays(tail.k, packed.k), *_arrays(tail.v, packed.v))
    lengths = jax.ShapeDtypeStruct(packed.length.shape, jnp.int32)
    results = [lengths, lengths, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)]
    packed_length, tail_length, *new = jax.ffi.ffi_call("minikv_append", results, input_output_aliases=_ALIASES)(
        *(k, v, count, packed.length, tail.length, *cache),
        k_bits=np.int32(storage.k_bits),
        v_bits=np.int32(storage.v_bits),
        group_size=np.int32(storage.group_size),
        sinks=np.int32(sinks),
        block=np.int32(block),
    )
    (tail_k, packed_k), (tail_v, packed_v) = _values(new[:7], packed.k), _values(new[7:], packed.v)
    return Region(packed_k, packed_v, packed_length), Region(tail_k, tail_v, tail_length)


def _arrays(tail: Array, packed: Packed) -> tuple[Array, ...]:
    """Flattens keys or values to the handler's seven arrays; a missing plane or factor has no elements."""
    batch, kv_heads, _, head_dim = tail.shape
    planes = (*packed.planes, jnp.zeros((batch, kv_heads, 0, head_dim), jnp.uint32))[:2]
    factors = packed.factors or (jnp.zeros((batch, kv_heads, 0, 1), jnp.float32),) * 2
    return tail, *planes, packed.scale, packed.zero, *factors


def _values(arrays: Sequence[Array], old: Packed) -> tuple[Array, Packed]:
    """The inverse of `_arrays`, with the planes and factors that `old` has."""
    tail, words, high_words, scale, zero, *factors = arrays
    planes = (words, high_words)[: len(old.planes)]
    return tail, Packed(planes, scale, zero, None if old.factors is None else (factors[0], factors[1]))


def _check(packed: Region[Packed], tail: Region[Array], storage: Storage, sinks: int, block: int) -> None:
    check_packed(_KERNEL, packed, storage)
    check_supported(_KERNEL, ("tail.k.dtype", tail.k.dtype.name, DTYPES))
    capacity, head_dim = tail.k.shape[2:]
    check_head_dim(_KERNEL, head_dim)
    unit = storage.packing_block
    if block < 1 or block % unit or sinks < 0 or sinks + block > capacity:
        raise ValueError(f"block={block}, sinks={sinks}: expected a multiple of {unit} within a tail of {capacity}")
