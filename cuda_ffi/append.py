"""One more token in every row of a cache, in place; a full tail gives its oldest block to the packed region."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration
from cuda_ffi.quantize import BITS, GROUP_SIZES, MAX_HEAD_DIM, METADATA_DTYPES

# Operands 3 and 4, the lengths, are results 0 and 1; operands 5 to 16, the cache, results 3 to 14.
_ALIASES = {3: 0, 4: 1} | {5 + i: 3 + i for i in range(12)}


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
    k_factors: tuple[jax.Array, jax.Array] | None = None,
    v_factors: tuple[jax.Array, jax.Array] | None = None,
) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
    """Writes each row's token behind its tail; a tail that is then full packs its oldest `block` non-sink tokens.

    The `C - sinks - block` tokens behind the block move down. A row whose tail and packed region are both full takes
    nothing. The cache arrays are updated in place where the caller lets go of them (donation, a loop's carry).

    Args:
      k, v: `[B, K, H]` in the tail's dtype.
      count: int32 `[B]`, 0 where a row gets no token.
      k_planes, v_planes: one uint32 array `[B, K, P * bits / 32, H]` each.
      k_scale, k_zero: `[B, K, P / g, H]`, float16, bfloat16 or float8_e4m3fn; v_scale, v_zero: `[B, K, P, H / g]`,
        the same dtype.
      tail_k, tail_v: `[B, K, C, H]`, float32, bfloat16 or float16.
      packed_length, tail_length: int32 `[B]`.
      sinks: leading tail slots that never leave.
      block: tokens packed at once, a multiple of the group size; `sinks + block <= C`.
      k_factors, v_factors: (scale factor, zero factor), float32 `[B, K, P / g, 1]`, for float8 metadata.

    Returns:
      The cache arguments by name, updated; factors where there are some.

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
    has_factors = k_scale.dtype == jnp.float8_e4m3fn
    if has_factors != (k_factors is not None) or has_factors != (v_factors is not None):
        raise ValueError(
            f"metadata dtype {k_scale.dtype}: k_factors and v_factors go with float8_e4m3fn, and only with it"
        )
    registration.load()
    none = jnp.zeros((*tail_k.shape[:2], 0, 1), jnp.float32)
    cache = (
        *(tail_k, k_planes[0], k_scale, k_zero, *(k_factors or (none, none))),
        *(tail_v, v_planes[0], v_scale, v_zero, *(v_factors or (none, none))),
    )
    lengths = jax.ShapeDtypeStruct(packed_length.shape, jnp.int32)
    old_lengths = jax.ShapeDtypeStruct((2, *packed_length.shape), jnp.int32)  # scratch
    results = [lengths, lengths, old_lengths, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)]
    new_packed_length, new_tail_length, _, *new = jax.ffi.ffi_call(
        "minikv_append", results, input_output_aliases=_ALIASES
    )(
        *(k, v, count, packed_length, tail_length, *cache),
        k_bits=np.int32(k_bits),
        v_bits=np.int32(v_bits),
        group_size=np.int32(group_size),
        sinks=np.int32(sinks),
        block=np.int32(block),
    )
    out: dict[str, jax.Array | tuple[jax.Array, ...]] = {
        "packed_length": new_packed_length,
        "tail_length": new_tail_length,
    }
    for name, side in (("k", new[:6]), ("v", new[6:])):
        out |= {
            f"tail_{name}": side[0],
            f"{name}_planes": (side[1],),
            f"{name}_scale": side[2],
            f"{name}_zero": side[3],
        }
        if has_factors:
            out[f"{name}_factors"] = (side[4], side[5])
    return out
