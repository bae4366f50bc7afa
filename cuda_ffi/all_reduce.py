"""Sums small arrays over the GPUs of one process, which write to one another's memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from cuda_ffi import registration
from cuda_ffi.arrays import check_supported
from cuda_ffi.library import LIBRARY
from cuda_ffi.quantize import DTYPES

ALL_REDUCE_BYTES = 2 << 20  # of an array; `kMaxBytes` in collectives/all_reduce.cu
_KERNEL = "CUDA all-reduce kernel"


def all_reduce(x: Float[Array, "*shape"], groups: Sequence[Sequence[int]]) -> Float[Array, "*shape"]:
    """Sums `x` over the devices of each group, in float32. All of them get the same bits.

    Call it inside `jax.shard_map`, on all devices of a group.

    Args:
      x: one device's part: float32, bfloat16 or float16, a multiple of 8 bytes up to `ALL_REDUCE_BYTES`.
      groups: CUDA device numbers; all groups have the same size.

    Returns:
      The sum in `x`'s dtype.

    Raises:
      ValueError: for groups of different sizes.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    if len({len(group) for group in groups}) != 1:
        raise ValueError(f"groups={groups}: expected groups of one size")
    check_supported(_KERNEL, ("x.dtype", x.dtype.name, DTYPES))
    if x.nbytes % 8 or x.nbytes > ALL_REDUCE_BYTES:
        raise NotImplementedError(
            f"{_KERNEL}: x of {x.nbytes} bytes: supported are multiples of 8 up to {ALL_REDUCE_BYTES}"
        )
    registration.load()
    for group in groups:
        _make_group(tuple(group))
    call = jax.ffi.ffi_call("minikv_all_reduce", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, members=np.array(groups, np.int32).reshape(-1), size=np.int32(len(groups[0])))


@functools.cache
def _make_group(devices: tuple[int, ...]) -> None:
    """Allocates a group's inboxes. Raises NotImplementedError if its devices do not reach one another's memory."""
    library = ctypes.CDLL(str(LIBRARY))
    library.minikv_make_group.restype = ctypes.c_char_p
    if reason := library.minikv_make_group((ctypes.c_int32 * len(devices))(*devices), len(devices)):
        raise NotImplementedError(f"{_KERNEL}: devices {', '.join(map(str, devices))}: {reason.decode()}")
