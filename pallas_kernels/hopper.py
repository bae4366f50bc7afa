"""What the kernels share: the device they run on, operand tiles in shared memory, and the launch of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE_CAPABILITY = "9.0"
MAX_SHARED_BYTES = 227 * 1024  # of one thread block
_RESERVED_BYTES = 3 * 1024  # barriers, alignment, and what reductions exchange
MULTIPROCESSORS = 132  # of the largest Hopper devices: what work is split for
COMPUTE_WARPGROUPS = 2  # a third one copies

# Registers a thread once the warpgroups have split the register file among them.
COMPUTE_REGISTERS = 232
MEMORY_REGISTERS = 40


def why_unavailable() -> str | None:
    """Why the kernels cannot run here (no GPU, another architecture), or None where they can."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return "platform=cpu: the Pallas kernels need an NVIDIA GPU"
    if device.compute_capability != COMPUTE_CAPABILITY:
        return f"compute capability {device.compute_capability}: the Pallas kernels need {COMPUTE_CAPABILITY} (Hopper)"
    return None


def operand(*shape: int, dtype: Any) -> Any:
    """Shared memory for a wgmma operand whose last dimension is a multiple of 64 16-bit values."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def check_shared_memory(scratch: dict[str, Any], config: Any) -> None:
    """Raises ValueError where the arrays of `scratch` do not fit into one thread block's shared memory."""
    arrays = [x for x in scratch.values() if hasattr(x, "shape")]
    used = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays) + _RESERVED_BYTES
    if used > MAX_SHARED_BYTES:
        raise ValueError(f"{config} needs {used} bytes of shared memory: a thread block has {MAX_SHARED_BYTES}")


def launch(body: Callable[..., None], out: Any, scratch: dict[str, Any], grid: dict[str, int]) -> Callable[..., Any]:
    """A kernel of two compute warpgroups and one for copies; the first axis of `grid` varies fastest."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
