"""Tests meshes: what is refused, and where arrays are placed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from minikv_jax import meshes


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"rows": 2}, "mesh axis 'rows': expected data or model"),
        ({"data": 0}, "mesh axis data=0: expected a size of at least 1"),
        ({"data": 4, "model": 4}, r"mesh data=4,model=4 needs 16 devices: there are 8 \(cpu\)"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(axes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(axes)


@pytest.mark.parametrize("text", ["", "data", "data=", "data=2,data=4", "model=-1", "data=٢", "data=2 model=4"])
def test_a_text_that_is_no_mesh_is_refused(text: str):
    with pytest.raises(ValueError, match="expected sizes of axes such as data=2,model=4"):
        meshes.parse(text)


def test_text():
    assert meshes.parse("data=2,model=4") == {"data": 2, "model": 4}
    assert dict(meshes.make_mesh(meshes.parse("model=2")).shape) == {"data": 1, "model": 2}


def test_any_mesh_of_these_axes_becomes_one_that_xla_partitions():
    """This includes explicit meshes, a single axis, and the axes in reverse order."""
    devices = np.array(jax.devices())
    explicit = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    assert meshes.automatic(explicit) == meshes.make_mesh({"data": 2, "model": 4})
    assert dict(meshes.automatic(Mesh(devices, ("model",))).shape) == {"data": 1, "model": 8}
    turned = meshes.automatic(Mesh(devices.reshape(4, 2), ("model", "data")))
    assert turned.devices.tolist() == devices.reshape(4, 2).T.tolist()
    with pytest.raises(ValueError, match=r"mesh axes \('data', 'expert'\): expected data and model, found 'expert'"):
        meshes.automatic(Mesh(devices.reshape(2, 4), ("data", "expert")))


def test_a_function_of_rows_and_heads_runs_on_each_devices_own():
    x = jnp.arange(4 * 8 * 3.0).reshape(4, 8, 3)
    shapes = []

    def function(x: jax.Array, scale: float) -> jax.Array:
        shapes.append(x.shape)
        return x * scale

    def call(x: jax.Array) -> jax.Array:
        return meshes.call_split(function, (x, 2.0), (1,))

    mesh = meshes.make_mesh({"data": 2, "model": 4})
    with meshes.use(mesh):
        out = jax.jit(call)(x)
    np.testing.assert_array_equal(out, 2 * x)
    assert set(shapes) <= {(2, 2, 3), x.shape}
    assert (2, 2, 3) in shapes
    assert out.sharding.spec == P("data", "model")
    np.testing.assert_array_equal(call(x), 2 * x)  # without a mesh, it is called directly


def test_own_heads_are_the_devices_part_of_what_is_known_of_all():
    factors = np.arange(8.0)
    x = jnp.ones((2, 8, 3))

    def function(x: jax.Array) -> jax.Array:
        return x * meshes.own_heads(factors, 0)[:, None]

    with meshes.use(meshes.make_mesh({"model": 8})):
        out = jax.jit(lambda x: meshes.call_split(function, (x,), (1,)))(x)
    np.testing.assert_array_equal(out, x * factors[:, None])


def test_placed_arrays_keep_their_values():
    mesh = meshes.make_mesh({"data": 4})
    ids, key = np.arange(8).reshape(4, 2), jax.random.key(7)
    placed, placed_key = meshes.place(ids, mesh, "data"), meshes.place(key, mesh)
    assert placed.addressable_shards[1].data.tolist() == [[2, 3]]
    np.testing.assert_array_equal(meshes.to_host(placed), ids)
    assert jax.random.uniform(placed_key) == jax.random.uniform(key)
