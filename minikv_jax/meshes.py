"""Device meshes: rows of a batch lie along the axis "data", heads along "model".

KV heads, their query heads, the MLP's columns and the vocabulary are split over "model". Code that computes says which
of its axes are which (`constrain`, `call_split`), and XLA's partitioner does the rest. Without a mesh all of it
does nothing.

The mesh in effect is JAX's own (`jax.set_mesh`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)
Result = TypeVar("Result")


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices of all processes.

    Args:
      axes: sizes of "data" and "model"; an axis that is left out has size 1.

    Raises:
      ValueError: another axis, a size below 1, or more devices than there are.
    """
    if unknown := [name for name in axes if name not in AXES]:
        raise ValueError(f"mesh axis {unknown[0]!r}: expected {' or '.join(AXES)}")
    sizes = [axes.get(name, 1) for name in AXES]
    if wrong := [f"{name}={size}" for name, size in axes.items() if size < 1]:
        raise ValueError(f"mesh axis {wrong[0]}: expected a size of at least 1")
    devices, count = jax.devices(), int(np.prod(sizes))
    if count > len(devices):
        what = ",".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(f"mesh {what} needs {count} devices: there are {len(devices)} ({devices[0].platform})")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"a mesh of {count} devices: {jax.process_count()} processes need one of all their {len(devices)} devices"
        )
    return jax.make_mesh(sizes, AXES, devices=devices[:count], axis_types=(AxisType.Auto,) * len(AXES))


def parse(text: str) -> dict[str, int]:
    """Sizes by axis of a text such as "data=2,model=4". Raises ValueError for any other."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([0-9]{1,6})", part.strip())
        if match is None or match[1] in sizes:
            raise ValueError(f"mesh {text!r}: expected sizes of axes such as data=2,model=4, each axis once")
        sizes[match[1]] = int(match[2])
    return sizes


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with axes that XLA's partitioner handles: "data" and "model", one of them or both.

    Raises:
      ValueError: another axis, or devices of several platforms.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ValueError(f"mesh axes {mesh.axis_names}: expected {' and '.join(AXES)}, found {unknown[0]!r}")
    platforms = sorted({device.platform for device in mesh.devices.flat})
    if len(platforms) > 1:
        raise ValueError(f"a mesh of {' and '.join(platforms)} devices: expected one platform")
    sizes = [mesh.shape.get(name, 1) for name in AXES]
    order = sorted(range(len(mesh.axis_names)), key=lambda i: AXES.index(mesh.axis_names[i]))
    return Mesh(mesh.devices.transpose(order).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ambient() -> Mesh | None:
    """The mesh of `jax.set_mesh`, if one is set and has axes. Not for use under `jit`."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh for the calls inside; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def size(axis: str) -> int:
    """Shards along an axis of the mesh in effect; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x: Any, *axes: str | None) -> Any:
    """Arrays whose leading axes lie along these mesh axes (None: on every device); other axes are not split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or MODEL in mesh.manual_axes:
        return x
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, P(*axes[: leaf.ndim])), x)


def place(x: Any, mesh: Mesh, *axes: str | None) -> Any:
    """Arrays of the host, the same in every process, on a mesh; leading axes as for `constrain`."""

    def put(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding(mesh, *axes[: host.ndim]), lambda index: host[index])

    return jax.tree.map(put, x)


def place_cache(cache: Result, mesh: Mesh) -> Result:
    """A cache made on other devices, moved to a mesh: rows along its axis "data", KV heads along "model".

    Raises:
      ValueError: rows or KV heads that do not divide by the axes, or other axes.
    """
    return jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), cache, placed_shapes(cache, mesh))


def default_device() -> SingleDeviceSharding:
    """The placement on JAX's default device."""
    return SingleDeviceSharding(jnp.zeros(()).devices().pop())


def placed_shapes(cache: Result, mesh: Mesh | None) -> Result:
    """Shapes of a cache with their places on a mesh, or on the default device. Raises as `place_cache` does."""
    if mesh is None:
        one = default_device()
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), cache)
    mesh = automatic(mesh)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        for axis, count in zip(AXES, leaf.shape, strict=False):
            if count % mesh.shape[axis]:
                what = "rows" if axis == DATA else "KV heads"
                raise ValueError(
                    f"a cache of {count} {what} on a mesh with {axis}={mesh.shape[axis]}: expected a multiple"
                )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, *AXES[: leaf.ndim]))

    return jax.tree.map(place, cache)


def to_host(x: jax.Array) -> np.ndarray:
    """An array's values, wherever its parts are."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The placement of an array whose leading axes lie along these mesh axes."""
    return NamedSharding(mesh, P(*axes))


def heads_at(axis: int | None) -> P:
    """The spec of an array with rows on axis 0 and heads on another one."""
    return P(DATA) if axis is None else P(DATA, *[None] * (axis - 1), MODEL)


def specs(tree: Any, axis: int | None) -> Any:
    """Specs of a pytree of arrays with heads on `axis`, if they have as many axes."""
    return jax.tree.map(lambda leaf: heads_at(axis if axis is not None and leaf.ndim > axis else None), tree)


def call_split(
    function: Callable[..., Result], arguments: tuple[Any, ...], heads: tuple[int | None, ...], outputs: Any = None
) -> Result:
    """Calls a function that treats rows and KV heads separately on each device's own.

    XLA's partitioner cannot look into a kernel, and moves whole caches for a gather or a sort of one.

    Args:
      arguments: pytrees of arrays, rows on axis 0; those that `heads` does not reach hold no arrays.
      heads: the axis of the heads in each argument (in its arrays that have as many axes); None if it has none.
      outputs: specs of the results, a prefix of their tree (`heads_at`, `specs`). By default heads are on axis 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or MODEL in mesh.manual_axes:
        return function(*arguments)
    arrays, rest = arguments[: len(heads)], arguments[len(heads) :]

    def on_one_device(*arrays: Any) -> Result:
        return function(*arrays, *rest)

    if outputs is None:
        outputs = specs(jax.eval_shape(on_one_device, *arrays), 1)
    inputs = tuple(specs(x, axis) for x, axis in zip(arrays, heads, strict=True))
    return jax.shard_map(on_one_device, in_specs=inputs, out_specs=outputs, check_vma=False)(*arrays)


def sum_of_products(x: Any, kernel: Any, product: Callable[[Any, Any], Any], reduce: Callable[[Any], Any]) -> Any:
    """`product(x, kernel)` if every device has the columns of `x` and the rows of `kernel` that belong to its heads.

    Args:
      x: `[B, T, F]`.
      kernel: `[F, D]`.
      product: of a device's own parts.
      reduce: sums the devices' products.
    """
    if size(MODEL) == 1:
        return product(x, kernel)
    return jax.shard_map(
        lambda x, kernel: reduce(product(x, kernel)),
        in_specs=(P(DATA, None, MODEL), P(MODEL)),
        out_specs=P(DATA),
        check_vma=False,
    )(x, kernel)


def own_heads(x: Any, axis: int) -> Any:
    """The part of an array of all KV heads that belongs to the device's own, inside `call_split`."""
    if MODEL not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    count = x.shape[axis] // size(MODEL)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(MODEL) * count, count, axis)
