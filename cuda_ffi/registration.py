"""Loads the library of CUDA kernels once and registers its handlers with XLA."""

from __future__ import annotations

import ctypes
import functools
import pathlib

import jax

from cuda_ffi.library import LIBRARY, architecture_of, source_digest

# FFI target -> exported symbol, for every handler in the library.
HANDLERS = {
    "minikv_all_reduce": "MinikvAllReduce",
    "minikv_append": "MinikvAppend",
    "minikv_column_sums": "MinikvColumnSums",
    "minikv_decode_attention": "MinikvDecodeAttention",
    "minikv_quantize": "MinikvQuantize",
    "minikv_read_checksum": "MinikvReadChecksum",
    "minikv_row_log_sum_exp": "MinikvRowLogSumExp",
    "minikv_window_votes": "MinikvWindowVotes",
}


def check_library(library: pathlib.Path) -> tuple[str, ...]:
    """Returns a library's architectures. The library must be built from the current sources.

    Raises:
      NotImplementedError: if the library is missing or stale, with the command that builds it.
    """
    how = "build it with `python -m cuda_ffi.build` (needs nvcc)"
    if not library.exists():
        raise NotImplementedError(f"the CUDA kernels are not built ({library} is missing): {how}")
    handle = ctypes.CDLL(str(library))
    try:
        handle.minikv_build_info.restype = ctypes.c_char_p
        info = handle.minikv_build_info().decode()
    except AttributeError:
        raise NotImplementedError(f"{library} is not a library of this package: {how}") from None
    fields = dict(field.split("=", 1) for field in info.split() if "=" in field)
    if fields.get("sources") != source_digest():
        raise NotImplementedError(f"{library} is stale, its sources have changed since: {how}")
    return tuple(fields["architectures"].split(","))


def check_architecture(architectures: tuple[str, ...], compute_capability: str, library: pathlib.Path) -> None:
    """Raises NotImplementedError unless code for `architectures` runs on a device of `compute_capability`."""
    needed = architecture_of(compute_capability)
    # Within one generation, code for a smaller minor version runs; sm_90a code runs on 9.0 only.
    if needed in architectures or (
        needed.startswith("8") and any(a.startswith("8") and a <= needed for a in architectures)
    ):
        return
    raise NotImplementedError(
        f"{library} holds code for {', '.join(architectures)}, this device is sm_{needed}: "
        f"build it with `python -m cuda_ffi.build --arch {needed}`"
    )


@functools.cache
def load() -> None:
    """Registers every handler; only the first call does anything.

    Raises:
      NotImplementedError: without a GPU, or if the library is missing, stale or for another architecture.
    """
    architectures = check_library(LIBRARY)
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        raise NotImplementedError("platform=cpu: the CUDA kernels need an NVIDIA GPU") from None
    check_architecture(architectures, devices[0].compute_capability, LIBRARY)
    library = ctypes.CDLL(str(LIBRARY))
    for target, symbol in HANDLERS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="CUDA")
