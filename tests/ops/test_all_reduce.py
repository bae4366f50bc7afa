"""Tests all-reduce over the mesh axis "model"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import cuda_ffi
from minikv_jax import meshes
from minikv_jax.ops.all_reduce import all_reduce


def summed(x: jax.Array, mesh: jax.sharding.Mesh, implementation: str | None, times: int = 1) -> jax.Array:
    """Sums `[data, model, ...]` over "model" on every device, and repeats this on the result `times` times."""

    def reduce(part: jax.Array) -> jax.Array:
        mean = jnp.asarray(1 / mesh.shape["model"], part.dtype)
        part = all_reduce(part, mesh, implementation=implementation)
        return jax.lax.fori_loop(
            1, times, lambda _, part: all_reduce(part * mean, mesh, implementation=implementation), part
        )

    spec = P("data", "model")
    call = jax.shard_map(reduce, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(call)(jax.device_put(x, meshes.sharding(mesh, *spec)))


def random(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def test_every_device_gets_the_sum_of_its_own_rows():
    mesh = meshes.make_mesh({"data": 2, "model": 4})
    x = random((2, 4, 3, 48), "float32")
    out = np.asarray(summed(x, mesh, None))
    np.testing.assert_allclose(out, np.broadcast_to(np.asarray(x).sum(1, keepdims=True), x.shape), rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 4096), (16, 4096), (3, 132), (1, 4), (127, 4096)])
def test_cuda_sums_like_float32(dtype: str, shape: tuple[int, ...]):
    """Sums are bit-equal on all devices and in every run, also after thousands of calls."""
    mesh = meshes.make_mesh({"model": jax.device_count()})
    x = random((1, jax.device_count(), *shape), dtype)
    assert x[0, 0].nbytes <= cuda_ffi.ALL_REDUCE_BYTES
    out = summed(x, mesh, "cuda")
    exact = np.asarray(x, np.float64).sum(1)
    step = float(jnp.finfo(dtype).eps) * np.abs(exact)
    for device in range(jax.device_count()):
        assert np.all(np.abs(np.asarray(out[:, device], np.float64) - exact) <= step)
    again = functools.partial(summed, x, mesh, "cuda", 3000)
    first, second = np.asarray(again()), np.asarray(again())
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:, :1], first.shape))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs")
def test_cuda_refuses_what_it_does_not_take():
    groups = [tuple(device.local_hardware_id for device in jax.devices())]
    with pytest.raises(NotImplementedError, match="x of 6 bytes: supported are multiples of 8 up to 2097152"):
        cuda_ffi.all_reduce(jnp.zeros(3, jnp.float16), groups)
    with pytest.raises(NotImplementedError, match="devices 0, 99: "):
        cuda_ffi.all_reduce(jnp.zeros(4), [(0, 99)])
