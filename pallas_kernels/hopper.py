"""What the kernels share: the device they run on, operand tiles in shared memory, and the launch of a kernel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE_CAPABILITY = "9.0"
MULTIPROCESSORS = 132  # of the largest Hopper devices: what work is split for
MAX_SHARED_BYTES = 227 * 1024  # of one thread block
_CACHED_BYTES = 16 * 2**20  # of the L2 cache, for what thread blocks that run side by side all read
# JAX 0.10 wants an index beside the reference that is loaded, JAX 0.11 warns of one.
_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()
_RESERVED_BYTES = 3 * 1024  # barriers, alignment, and what reductions exchange
COMPUTE_WARPGROUPS = 2  # unless a kernel's config says otherwise; one more copies

# Registers a thread, of a computing and of the copying warpgroup, once they have split the register file among them.
REGISTERS = {2: (232, 40), 4: (112, 32)}
COMPUTE_REGISTERS, MEMORY_REGISTERS = REGISTERS[COMPUTE_WARPGROUPS]


def why_unavailable() -> str | None:
    """Why the kernels cannot run here (no GPU, another architecture), or None where they can."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return "platform=cpu: the Pallas kernels need an NVIDIA GPU"
    if device.compute_capability != COMPUTE_CAPABILITY:
        return f"compute capability {device.compute_capability}: the Pallas kernels need {COMPUTE_CAPABILITY} (Hopper)"
    return None


def device_kind() -> str | None:
    """What the GPU calls itself, or None where there is none."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return None


def operand(*shape: int, dtype: Any) -> Any:
    """Shared memory for a wgmma operand whose last dimension is a multiple of 64 16-bit values."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def load(ref: Any, layout: Any) -> jax.Array:
    """All of `ref` in registers, in any layout: the load need not be a fast one."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def shared_bytes(scratch: dict[str, Any]) -> int:
    """Bytes of a thread block's shared memory that the arrays of `scratch` take."""
    arrays = [x for x in scratch.values() if hasattr(x, "shape")]
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays) + _RESERVED_BYTES


def fits(scratch: dict[str, Any]) -> bool:
    """Whether a thread block has the shared memory that `scratch` takes."""
    return shared_bytes(scratch) <= MAX_SHARED_BYTES


def check_shared_memory(scratch: dict[str, Any], config: Any) -> None:
    """Raises ValueError where the arrays of `scratch` do not fit into one thread block's shared memory."""
    if not fits(scratch):
        used = shared_bytes(scratch)
        raise ValueError(f"{config} needs {used} bytes of shared memory: a thread block has {MAX_SHARED_BYTES}")


def streams_per_section(streams: int, stream_bytes: int) -> int:
    """Of how many KV heads (over all rows) the thread blocks are to start side by side, long ones first.

    So few that what the blocks of a head all read, `stream_bytes`, stays in the L2 cache for every one of them; not
    one by one, or the long blocks of the last head would start last.
    """
    most = max(2, _CACHED_BYTES // stream_bytes)
    return max(divisor for divisor in range(1, min(streams, most) + 1) if streams % divisor == 0)


def launch(
    body: Callable[..., None],
    out: Any,
    scratch: dict[str, Any],
    grid: dict[str, int],
    warpgroups: int = COMPUTE_WARPGROUPS,
) -> Callable[..., Any]:
    """A kernel of `warpgroups` that compute and one that copies; blocks start with the last axis of `grid` fastest."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
