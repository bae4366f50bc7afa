"""All-reduce: the sum of what the devices of a mesh hold, which ends attention and the MLP of a split layer."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minikv_jax.meshes import MODEL
from minikv_jax.ops import dispatch

KERNEL_BYTES = 1 << 21  # the largest array that the CUDA kernel takes: beyond it, bandwidth counts and NCCL has more


def all_reduce(x: Float[Array, "*shape"], mesh: Mesh, *, implementation: str | None = None) -> Float[Array, "*shape"]:
    """The sum of `x` over the mesh axis "model", for use inside `jax.shard_map`.

    "xla" and "pallas" take XLA's collective (NCCL's on a GPU). "cuda" exchanges small arrays through the memory of the
    GPUs, in one kernel, and takes XLA's for arrays above `KERNEL_BYTES`.

    Args:
      x: each device's part of the sum.
      mesh: where the devices are.

    Raises:
      NotImplementedError: "cuda" by name on devices that cannot reach one another's memory, or of several processes.
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
    """Numbers of the CUDA devices that hold one batch row's heads, for each set of rows."""
    if jax.process_count() > 1:
        raise NotImplementedError(f"{jax.process_count()} processes: the CUDA all-reduce is for the GPUs of one")
    axes = [mesh.axis_names.index(MODEL)]
    rows = mesh.devices.transpose([*(i for i in range(mesh.devices.ndim) if i not in axes), *axes])
    return tuple(tuple(device.local_hardware_id for device in row) for row in rows.reshape(-1, mesh.shape[MODEL]))


_IMPLEMENTATIONS = {"xla": _collective, "pallas": _collective, "cuda": _cuda}
