"""Group-wise quantisation and packing of keys and values in one pass over memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cuda_ffi import registration
from cuda_ffi.arrays import BITS, GROUP_SIZES, METADATA_DTYPES, PLANES, Packed, check_supported, packing_block

DTYPES = ("float32", "bfloat16", "float16")
_MAX_HEAD_DIM = 256
_SLAB_TOKENS = 16  # of a thread
_KERNEL = "CUDA quantisation kernel"


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
      bits: 2, 3 or 4.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token.
      metadata_dtype: "float16", "bfloat16" or "float8_e4m3fn".
      factor_block: tokens that share a factor of float8 metadata; by default the packing block. For groups of 16, 32
        tokens are supported too: the packing block of 2 bits beside 3.

    Returns:
      The codes, scales and zeros; factors for float8 metadata.

    Raises:
      ValueError: for a wrong axis or sizes that do not divide.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    check(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype, factor_block=factor_block)
    registration.load()
    batch, kv_heads, tokens, head_dim = x.shape
    has_factors, factor_block = metadata_dtype == "float8_e4m3fn", factor_block or packing_block(bits, group_size)
    rows, columns = (tokens // group_size, head_dim) if axis == "tokens" else (tokens, head_dim // group_size)
    metadata = jax.ShapeDtypeStruct((batch, kv_heads, rows, columns), jnp.dtype(metadata_dtype))
    words, high_words = (
        jax.ShapeDtypeStruct((batch, kv_heads, tokens * width // 32, head_dim), jnp.uint32)
        for width in (*PLANES[bits], 0)[:2]  # without a second plane, an array without words
    )
    factor = jax.ShapeDtypeStruct((batch, kv_heads, tokens // factor_block if has_factors else 0, 1), jnp.float32)
    call = jax.ffi.ffi_call("minikv_quantize", (words, high_words, metadata, metadata, factor, factor))
    *planes, scale, zero, scale_factor, zero_factor = call(
        x,
        bits=np.int32(bits),
        group_size=np.int32(group_size),
        factor_block=np.int32(factor_block),
        by_tokens=np.bool_(axis == "tokens"),
    )
    factors = (scale_factor, zero_factor) if has_factors else None
    return Packed(tuple(planes[: len(PLANES[bits])]), scale, zero, factors)


def check(
    x: jax.Array, *, bits: int, group_size: int, axis: str, metadata_dtype: str, factor_block: int | None = None
) -> None:
    """Refuses what the kernel does not support, from shapes and dtypes.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for a wrong axis or sizes that do not divide.
    """
    check_supported(
        _KERNEL,
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata_dtype", metadata_dtype, METADATA_DTYPES),
        ("x.dtype", x.dtype.name, DTYPES),
    )
    block = packing_block(bits, group_size)
    check_supported(_KERNEL, ("factor_block", factor_block or block, sorted({block, max(group_size, 32)})))
    if axis not in ("tokens", "channels"):
        raise ValueError(f"axis={axis!r}: expected 'tokens' or 'channels'")
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: expected [B, K, S, H]")
    tokens, head_dim = x.shape[2:]
    check_head_dim(_KERNEL, head_dim)
    if metadata_dtype == "float8_e4m3fn":
        unit = factor_block or block
    else:
        unit = block if axis == "tokens" else packing_block(bits, 1)
    if tokens % unit or (axis == "channels" and head_dim % group_size):
        raise ValueError(
            f"x has shape {x.shape}: expected a multiple of {unit} tokens and whole groups of {group_size}"
        )
    if tokens % _SLAB_TOKENS:
        raise NotImplementedError(f"{tokens} tokens: the {_KERNEL} supports multiples of {_SLAB_TOKENS}")


def check_head_dim(kernel: str, head_dim: int) -> None:
    """Raises NotImplementedError unless thread blocks of `kernel` can take all channels of a head."""
    if head_dim % 32 or head_dim > _MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim={head_dim}: the {kernel} supports multiples of 32 to {_MAX_HEAD_DIM}")
