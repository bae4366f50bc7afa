"""Group-wise quantisation and packing of keys and values in one pass over memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

BITS = (2, 4)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
MAX_HEAD_DIM = 256


def quantize(
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    axis: str,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Codes, scales and zeros of `x`, bit for bit as `docs/architecture.md` defines them.

    Args:
      x: `[B, K, S, H]`, float32, bfloat16 or float16; `S` fills whole groups and words.
      bits: 2 or 4.
      axis: "tokens" groups consecutive tokens of one channel (keys), "channels" consecutive channels of one token.
      metadata_dtype: "float16", "bfloat16" or "float8_e4m3fn".
      factor_block: tokens that share a factor of float8 metadata; only `group_size`, the default, is supported.

    Returns:
      `(planes, scale, zero, scale_factor, zero_factor)`: uint32 `[B, K, S * bits / 32, H]`; twice `[B, K, S / g, H]` or
      `[B, K, S, H / g]`; and for float8 metadata twice float32 `[B, K, S / g, 1]`, else None.

    Raises:
      ValueError: for a wrong axis or sizes that do not divide.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    for name, value, supported in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("metadata_dtype", metadata_dtype, METADATA_DTYPES),
        ("x.dtype", x.dtype.name, ("float32", "bfloat16", "float16")),
    ):
        if value not in supported:
            raise NotImplementedError(
                f"{name}={value}: the CUDA quantisation kernel supports {', '.join(map(str, supported))}"
            )
    if axis not in ("tokens", "channels"):
        raise ValueError(f"axis={axis!r}: expected 'tokens' or 'channels'")
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: expected [B, K, S, H]")
    batch, kv_heads, tokens, head_dim = x.shape
    if head_dim % 32 or head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"head_dim={head_dim}: the CUDA quantisation kernel supports multiples of 32 to 256")
    grouped = tokens if axis == "tokens" else head_dim
    has_factors = metadata_dtype == "float8_e4m3fn"
    if has_factors and factor_block not in (None, group_size):
        raise NotImplementedError(
            f"factor_block={factor_block}: the CUDA quantisation kernel supports the group size, {group_size}"
        )
    unit = group_size if has_factors else 16  # a factor is for `group_size` tokens
    if tokens % unit or grouped % group_size:
        raise ValueError(
            f"x has shape {x.shape}: expected a multiple of {unit} tokens and whole groups of {group_size}"
        )
    registration.load()
    rows, columns = (tokens // group_size, head_dim) if axis == "tokens" else (tokens, head_dim // group_size)
    metadata = jax.ShapeDtypeStruct((batch, kv_heads, rows, columns), jnp.dtype(metadata_dtype))
    words = jax.ShapeDtypeStruct((batch, kv_heads, tokens * bits // 32, head_dim), jnp.uint32)
    factor = jax.ShapeDtypeStruct((batch, kv_heads, tokens // group_size if has_factors else 0, 1), jnp.float32)
    planes, scale, zero, *factors = jax.ffi.ffi_call("minikv_quantize", (words, metadata, metadata, factor, factor))(
        x, bits=np.int32(bits), group_size=np.int32(group_size), by_tokens=np.bool_(axis == "tokens")
    )
    scale_factor, zero_factor = factors if has_factors else (None, None)
    return (planes,), scale, zero, scale_factor, zero_factor
