"""One more token in every row of a cache, in place; a full tail gives its oldest block to the packed region."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.quantize import BITS, GROUP_SIZES, MAX_HEAD_DIM, METADATA_DTYPES

# Operands 5 to 12 (tails, words, scales and zeros) are results 0 to 7.
_ALIASES = {5 + i: i for i in range(8)}


def append(
    k: jax.Array,
    v: jax.Array,
    count: jax.Array,
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
    sinks: int,
    block: int,
) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
    """Writes each row's token behind its tail; a tail that is then full packs its oldest `block` non-sink tokens.

    The `C - sinks - block` tokens behind the block move down. A row whose tail and packed region are both full takes
    nothing. The cache arrays are updated in place where the caller lets go of them (donation, a loop's carry).

    Args:
      k, v: `[B, K, H]` in the tail's dtype.
      count: int32 `[B]`, 0 where a row gets no token.
      k_planes, v_planes: one uint32 array `[B, K, P * bits / 32, H]` each.
      k_scale, k_zero: `[B, K, P / g, H]`, float16 or bfloat16; v_scale, v_zero: `[B, K, P, H / g]`, the same dtype.
      tail_k, tail_v: `[B, K, C, H]`, float32, bfloat16 or float16.
      packed_length, tail_length: int32 `[B]`.
      sinks: leading tail slots that never leave.
      block: tokens packed at once, a multiple of the group size; `sinks + block <= C`.

    Returns:
      The cache arguments by name, updated.

    Raises:
      ValueError: for sizes that do not belong together.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    head_dim = tail_k.shape[-1]
    for name, value, supported in (
        ("k_bits", k_bits, BITS),
        ("v_bits", v_bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata dtype", k_scale.dtype.name, METADATA_DTYPES),
        ("tail_k.dtype", tail_k.dtype.name, ("float32", "bfloat16", "float16")),
    ):
        if value not in supported:
            raise NotImplementedError(
                f"{name}={value}: the CUDA append kernel supports {', '.join(map(str, supported))}"
            )
    if head_dim % 32 or head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim={head_dim}: the CUDA append kernel supports multiples of 32 to 256")
    if block < 1 or block % group_size or sinks < 0 or sinks + block > tail_k.shape[2]:
        raise ValueError(
            f"block={block}, sinks={sinks}: expected whole groups of {group_size} within a tail of {tail_k.shape[2]}"
        )
    registration.load()
    operands = (
        k,
        v,
        count,
        packed_length,
        tail_length,
        tail_k,
        tail_v,
        k_planes[0],
        k_scale,
        k_zero,
        v_planes[0],
        v_scale,
        v_zero,
    )
    lengths = jax.ShapeDtypeStruct(packed_length.shape, jnp.int32)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[5:]] + [lengths, lengths]
    new = jax.ffi.ffi_call("minikv_append", results, input_output_aliases=_ALIASES)(
        *operands,
        k_bits=np.int32(k_bits),
        v_bits=np.int32(v_bits),
        group_size=np.int32(group_size),
        sinks=np.int32(sinks),
        block=np.int32(block),
    )
    names = ("tail_k", "tail_v", "k_planes", "k_scale", "k_zero", "v_planes", "v_scale", "v_zero")
    out = dict(zip((*names, "packed_length", "tail_length"), new, strict=True))
    return out | {"k_planes": (out["k_planes"],), "v_planes": (out["v_planes"],)}
