"""CUDA C++ kernels for compressed KV caches behind the XLA FFI, for sm_80, sm_86, sm_89 and sm_90a.

Imports nothing from `minikv_jax`: the functions take plain arrays in the layout of `docs/packed-layout.md`.
"""

from cuda_ffi import registration
from cuda_ffi.all_reduce import ALL_REDUCE_BYTES, all_reduce
from cuda_ffi.append import append
from cuda_ffi.arrays import Packed, Region, Storage
from cuda_ffi.decode_attention import decode_attention, decode_unpacked
from cuda_ffi.prefill_attention import prefill_attention
from cuda_ffi.quantize import quantize
from cuda_ffi.window_votes import window_votes


def why_unavailable() -> str | None:
    """Why the kernels cannot run here (no GPU, not built, stale, other architecture), or None if they can."""
    try:
        registration.load()
    except NotImplementedError as error:
        return str(error)
    return None


__all__ = [
    "ALL_REDUCE_BYTES",
    "Packed",
    "Region",
    "Storage",
    "all_reduce",
    "append",
    "decode_attention",
    "decode_unpacked",
    "prefill_attention",
    "quantize",
    "why_unavailable",
    "window_votes",
]
