"""Device checks, operand tiles in shared memory, and the launch of a kernel, shared by all kernels."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE_CAPABILITY = "9.0"
MULTIPROCESSORS = 132  # on the largest Hopper devices; work is split for as many
MAX_SHARED_BYTES = 227 * 1024  # per thread block
_L2_SHARE_BYTES = 16 * 2**20  # part of the L2 cache for operands that concurrent thread blocks share
# JAX 0.10 wants an index beside the reference that is loaded, JAX 0.11 warns of one.
_LOAD_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()
_RESERVED_SHARED_BYTES = 3 * 1024  # for barriers, alignment and the exchanges of reductions
COMPUTE_WARPGROUPS = 2  # the default; one more warpgroup copies

# Warpgroups that compute -> registers per thread of those and of the copying one, after they split the register file.
REGISTERS = {2: (232, 40), 4: (112, 32)}
COMPUTE_REGISTERS, MEMORY_REGISTERS = REGISTERS[COMPUTE_WARPGROUPS]


def why_unavailable() -> str | None:
    """Why the kernels cannot run here (no GPU, another architecture), or None if they can."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return "platform=cpu: the Pallas kernels need an NVIDIA GPU"
    if device.compute_capability != COMPUTE_CAPABILITY:
        return f"compute capability {device.compute_capability}: the Pallas kernels need {COMPUTE_CAPABILITY} (Hopper)"
    return None


def check_available() -> None:
    """Raises NotImplementedError with the reason if the kernels cannot run here."""
    reason = why_unavailable()
    if reason:
        raise NotImplementedError(reason)


def device_kind() -> str | None:
    """Name of the GPU, or None without one."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return None


def operand(*shape: int, dtype: Any) -> Any:
    """Shared memory for a wgmma operand whose last dimension is a multiple of 64 16-bit values."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads `ref` into registers in any layout, even if the load is slow."""
    return plgpu.load(ref, *_LOAD_INDEX, layout=layout, optimized=False)


def shared_bytes(scratch: dict[str, Any]) -> int:
    """Bytes of shared memory per thread block that the arrays of `scratch` take."""
    arrays = [x for x in scratch.values() if hasattr(x, "shape")]
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays) + _RESERVED_SHARED_BYTES


def fits(scratch: dict[str, Any]) -> bool:
    """Whether `scratch` fits into the shared memory of a thread block."""
    return shared_bytes(scratch) <= MAX_SHARED_BYTES


def check_shared_memory(scratch: dict[str, Any], config: Any) -> None:
    """Raises ValueError if the arrays of `scratch` do not fit into the shared memory of a thread block."""
    if not fits(scratch):
        used = shared_bytes(scratch)
        raise ValueError(f"{config} needs {used} bytes of shared memory: a thread block has {MAX_SHARED_BYTES}")


def streams_per_section(streams: int, stream_bytes: int) -> int:
    """Number of KV heads whose thread blocks are scheduled together, longest first.

    Few enough that the operand which all blocks of a head read, `stream_bytes`, stays in the L2 cache for each head;
    at least two, or the long blocks of the last head would start last.

    Args:
      streams: KV heads over all rows; the result divides it.
      stream_bytes: bytes of the operand of one head.
    """
    limit = max(2, _L2_SHARE_BYTES // stream_bytes)
    return max(divisor for divisor in range(1, min(streams, limit) + 1) if streams % divisor == 0)


def launch(
    body: Callable[..., None],
    out: Any,
    scratch: dict[str, Any],
    grid: dict[str, int],
    warpgroups: int = COMPUTE_WARPGROUPS,
) -> Callable[..., Any]:
    """Builds a kernel of `warpgroups` that compute and one that copies.

    Blocks start with the last axis of `grid` fastest.
    `body` takes references to the inputs and outputs, and `shared`, which has those of `scratch` as attributes.
    """

    def kernel(*arrays: Any, **shared: Any) -> None:
        body(*arrays, shared=types.SimpleNamespace(**shared))

    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
