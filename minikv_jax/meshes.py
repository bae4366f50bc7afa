"""Device meshes: rows of a batch are split over the axis "data", heads over "model".

KV heads, their query heads, the MLP's columns and the vocabulary are split over "model". Computing code names the axes
of its arrays (`constrain`, `call_split`), and XLA's partitioner does the rest. Without a mesh these functions do
nothing.

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
    """Makes a device mesh over the first devices of all processes.

    Args:
      axes: sizes of "data" (rows) and "model" (heads); an axis that is left out has size 1.

    Returns:
      A mesh of both axes, for `load`, `shard_model`, `place_cache` and `restore_cache`.

    Raises:
      ValueError: another axis, a size below 1, more devices than there are, or, with several processes, fewer devices
        than all of them.
    """
    _check_axes(axes)
    sizes = [axes.get(name, 1) for name in AXES]
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
    """Reads sizes by axis from a text such as "data=2,model=4".

    Raises:
      ValueError: any other text, another axis, or a size below 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([0-9]{1,6})", part.strip())
        if match is None or match[1] in sizes:
            raise ValueError(f"mesh {text!r}: expected sizes of axes such as data=2,model=4, each axis once")
        sizes[match[1]] = int(match[2])
    _check_axes(sizes)
    return sizes


def _check_axes(axes: Mapping[str, int]) -> None:
    if unknown := [name for name in axes if name not in AXES]:
        raise ValueError(f"mesh axis {unknown[0]!r}: expected {' or '.join(AXES)}")
    if wrong := [f"{name}={size}" for name, size in axes.items() if size < 1]:
        raise ValueError(f"mesh axis {wrong[0]}: expected a size of at least 1")


def check_multiple(what: str, count: int, axis: str, shards: int) -> None:
    """Raises ValueError unless a number of rows or heads can be split over an axis of `shards` devices."""
    if count % shards:
        raise ValueError(f"{count} {what} on a mesh with {axis}={shards}: expected a multiple")


def automatic(mesh: Mesh) -> Mesh:
    """Converts a mesh of "data", "model" or both to one that has both axes, handled by XLA's partitioner.

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
    """Returns the mesh of `jax.set_mesh`, or None if none is set. Not for use under `jit`."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh for the calls inside; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def size(axis: str) -> int:
    """Number of shards along an axis of the mesh in effect; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x: Any, *axes: str | None) -> Any:
    """Splits the leading axes of arrays over these mesh axes (None: not split). Other axes are not split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or MODEL in mesh.manual_axes:
        return x
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, P(*axes[: leaf.ndim])), x)


def place(x: Any, mesh: Mesh, *axes: str | None) -> Any:
    """Puts host arrays, equal in every process, on a mesh. Leading axes are split as by `constrain`."""

    def put(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding(mesh, *axes[: host.ndim]), lambda index: host[index])

    return jax.tree.map(put, x)


def place_cache(cache: Result, mesh: Mesh) -> Result:
    """Moves a cache to a mesh: rows are split over the axis "data", KV heads over "model".

    Args:
      cache: a `KVCache` on any devices.
      mesh: a mesh with the axes "data" and "model", or one of them (`make_mesh`).

    Returns:
      The cache with the same values on the mesh.

    Raises:
      ValueError: rows or KV heads that are no multiple of their axis, or other axes.
    """
    return jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), cache, placed_shapes(cache, mesh))


def default_device() -> SingleDeviceSharding:
    """Placement on JAX's default device."""
    return SingleDeviceSharding(jnp.zeros(()).devices().pop())


def placed_shapes(cache: Result, mesh: Mesh | None) -> Result:
    """Shapes of a cache, placed on a mesh or on the default device. Raises the errors of `place_cache`."""
    if mesh is None:
        one = default_device()
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), cache)
    mesh = automatic(mesh)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        for axis, count in zip(AXES, leaf.shape, strict=False):
            check_multiple("rows" if axis == DATA else "KV heads", count, axis, mesh.shape[axis])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, *AXES[: leaf.ndim]))

    return jax.tree.map(place, cache)


def to_host(x: jax.Array) -> np.ndarray:
    """Copies an array to the host, wherever its parts are."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Placement of an array whose leading axes are split over these mesh axes."""
    return NamedSharding(mesh, P(*axes))


def heads_at(axis: int | None) -> P:
    """Partition spec of an array with rows on axis 0 and heads on `axis` (None: without heads)."""
    return P(DATA) if axis is None else P(DATA, *[None] * (axis - 1), MODEL)


def specs(tree: Any, axis: int | None) -> Any:
    """Partition specs of a pytree whose arrays have heads on `axis`, unless they have too few axes for that."""
    return jax.tree.map(lambda leaf: heads_at(axis if axis is not None and leaf.ndim > axis else None), tree)


def call_split(
    function: Callable[..., Result], arguments: tuple[Any, ...], heads: tuple[int | None, ...], outputs: Any = None
) -> Result:
    """Calls a function on each device's own rows and heads. The function must treat rows and KV heads independently.

    XLA's partitioner cannot look into a kernel, and it moves a whole cache to gather from it or sort it.

    Args:
      function: the function to call.
      arguments: pytrees of arrays with rows on axis 0. Arguments beyond `heads` hold no arrays.
      heads: for each argument, the axis of the heads (in arrays that have as many axes); None if it has no heads.
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
    """Multiplies `x` by `kernel`, of which every device has its own columns and rows, and sums over the devices.

    Args:
      x: `[B, T, F]`.
      kernel: `[F, D]`.
      product: multiplies a device's own parts.
      reduce: sums the devices' products.
    """
    return jax.shard_map(
        lambda x, kernel: reduce(product(x, kernel)),
        in_specs=(P(DATA, None, MODEL), P(MODEL)),
        out_specs=P(DATA),
        check_vma=False,
    )(x, kernel)


def own_heads(x: Any, axis: int) -> Any:
    """Cuts an array of all KV heads down to the device's own heads, inside `call_split`."""
    if MODEL not in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    count = x.shape[axis] // size(MODEL)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(MODEL) * count, count, axis)


def read_rows(x: Any, start: jax.Array, rows: int) -> Any:
    """Reads `rows` rows of each device, from its row `start` on, of an array `[B, ...]`."""
    return lax.dynamic_slice_in_dim(_by_device(x), start, rows, axis=1).reshape(-1, *x.shape[1:])


def write_rows(x: Result, rows: Result, start: jax.Array) -> Result:
    """Writes `rows` into `x` from row `start` on, on each device. Both are pytrees of arrays `[B, ...]`."""

    def write(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(_by_device(x), _by_device(rows), start, axis=1).reshape(x.shape)

    return jax.tree.map(write, x, rows)


def _by_device(x: jax.Array) -> jax.Array:
    """Splits the axis of rows into devices and the rows of each."""
    return x.reshape(size(DATA), -1, *x.shape[1:])
