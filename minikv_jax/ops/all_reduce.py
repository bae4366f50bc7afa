"""All-reduce: sums over the devices of a mesh, at the end of attention and of the MLP in a split layer."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minikv_jax.meshes import MODEL
from minikv_jax.ops import dispatch


def all_reduce(x: Float[Array, "*shape"], mesh: Mesh, *, implementation: str | None = None) -> Float[Array, "*shape"]:
    """Sums `x` over the mesh axis "model". For use inside `jax.shard_map`.

    "xla" and "pallas" use XLA's collective (NCCL's on a GPU). "cuda" exchanges small arrays through the GPUs' memory in
    one kernel. Above `cuda_ffi.ALL_REDUCE_BYTES`, where bandwidth counts and NCCL has more, it uses XLA's collective.

    Args:
      x: each device's part of the sum.
      mesh: the mesh of the devices, of axes "data" and "model" in this order (`Llama.mesh`).
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU.

    Returns:
      The sum, in `x`'s dtype and equal on all devices of a row.

    Raises:
      NotImplementedError: "cuda" by name on devices that cannot access each other's memory, or of several processes.
    """
    sizes = {"bytes": x.nbytes, "devices": mesh.shape[MODEL]}
    return dispatch.run("all_reduce", implementation, sizes, _IMPLEMENTATIONS, x, mesh, heads=())


def _collective(x: Array, mesh: Mesh) -> Array:
    del mesh
    return lax.psum(x, MODEL)


def _cuda(x: Array, mesh: Mesh) -> Array:
    package = dispatch.package("cuda")
    return _collective(x, mesh) if x.nbytes > package.ALL_REDUCE_BYTES else package.all_reduce(x, _groups(mesh))


@functools.cache
def _groups(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Lists, for each set of rows, the numbers of the CUDA devices that hold its heads."""
    if jax.process_count() > 1:
        raise NotImplementedError(f"{jax.process_count()} processes: the CUDA all-reduce supports a single process")
    return tuple(tuple(device.local_hardware_id for device in row) for row in mesh.devices)  # [data, model]


_IMPLEMENTATIONS = {"xla": _collective, "pallas": _collective, "cuda": _cuda}
