"""Reads memory at full speed, the yardstick of the memory-bound kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from cuda_ffi import registration

_BLOCKS = 1024  # thread blocks of the kernel


def read_checksum(data: UInt32[Array, "words"]) -> UInt32[Array, "blocks"]:
    """Exclusive-or of a uint32 array, as uint32 `[blocks]` partial results; reads every word once.

    Raises:
      ValueError: for another dtype or a size that is not a multiple of 4.
      NotImplementedError: if the kernels cannot run here.
    """
    if data.dtype != jnp.uint32 or data.size % 4:
        raise ValueError(f"data is {data.dtype}[{data.size}]: expected uint32 and a multiple of 4")
    registration.load()
    return jax.ffi.ffi_call("minikv_read_checksum", jax.ShapeDtypeStruct((_BLOCKS,), jnp.uint32))(data)
