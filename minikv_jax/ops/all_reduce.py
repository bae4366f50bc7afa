"""All-reduce: sums over the devices of a mesh, at the end of attention and of the MLP in a split layer."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minikv_jax.meshes import MODEL
from minikv_jax.ops import dispatch

KERNEL_BYTES = 1 << 21  # largest array of the CUDA kernel; above it, bandwidth counts, and NCCL has more


def all_reduce(x: Float[Array, "*shape"], mesh: Mesh, *, implementation: str | None = None) -> Float[Array, "*shape"]:
    """Sums `x` over the mesh axis "model". For use inside `jax.shard_map`.

    "xla" and "pallas" use XLA's collective (NCCL's on a GPU). "cuda" exchanges small arrays through the GPUs' memory in
    one kernel, and uses XLA's collective for arrays above `KERNEL_BYTES`.

    Args:
      x: each device's part of the sum.
      mesh: the mesh of the devices.
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU.

    Raises:
      NotImplementedError: "cuda" by name on devices that cannot access each other's memory, or of several processes.
    """
    sizes = {"bytes": x.nbytes, "devices": mesh.shape[MODEL]}
    return dispatch.run("all_reduce", implementation, sizes, _IMPLEMENTATIONS, x, mesh, heads=())


def _collective(x: Array, mesh: Mesh) -> Array:
    del mesh
    return lax.psum(x, MODEL)


def _cuda(x: Array, mesh: Mesh) -> Array:
    if x.nbytes > KERNEL_BYTES:
        return _collective(x, mesh)
    return dispatch.package("cuda").all_reduce(x, _groups(mesh))


@functools.cache
def _groups(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Lists, for each set of rows, the numbers of the CUDA devices that hold its heads."""
    if jax.process_count() > 1:
        raise NotImplementedError(f"{jax.process_count()} processes: the CUDA all-reduce supports a single process")
    axes = [mesh.axis_names.index(MODEL)]
    rows = mesh.devices.transpose([*(i for i in range(mesh.devices.ndim) if i not in axes), *axes])
    return tuple(tuple(device.local_hardware_id for device in row) for row in rows.reshape(-1, mesh.shape[MODEL]))


_IMPLEMENTATIONS = {"xla": _collective, "pallas": _collective, "cuda": _cuda}
