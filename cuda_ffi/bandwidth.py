"""Reads memory at full speed: what the memory-bound kernels are measured against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cuda_ffi import registration

_BLOCKS = 1024


def read_checksum(data: jax.Array) -> jax.Array:
    """Exclusive-or of a uint32 array, as uint32 `[blocks]` partial results; reads every word once.

    Raises:
      ValueError: for another dtype or a size that is not a multiple of 4.
      NotImplementedError: where the kernels cannot run.
    """
    if data.dtype != jnp.uint32 or data.size % 4:
        raise ValueError(f"data is {data.dtype}[{data.size}]: expected uint32 and a multiple of 4")
    registration.load()
    return jax.ffi.ffi_call("minikv_read_checksum", jax.ShapeDtypeStruct((_BLOCKS,), jnp.uint32))(data)
