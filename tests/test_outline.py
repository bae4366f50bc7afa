"""Tests that an outlined function is in a program once, and that calls outside of programs stay as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minikv_jax import meshes
from minikv_jax.arrays import Contract, debug_checks
from minikv_jax.outline import outlined


def counted(in_place: bool = False):
    """An outlined function, and the list of the factors that it was traced or called with."""
    seen: list[int] = []

    @outlined("factor", in_place=in_place)
    def scaled(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
        seen.append(factor)
        return jnp.sin(x) * factor, x + factor

    return scaled, seen


@pytest.mark.parametrize("in_place", [False, True])
def test_equal_calls_are_traced_once(in_place: bool):
    scaled, seen = counted(in_place)

    def program(x: jax.Array) -> jax.Array:
        for factor in (2, 2, 3, 2):
            x, _ = scaled(x, factor)
        return x

    x = jnp.arange(4.0)
    lowered = jax.jit(program).lower(x)
    assert seen == [2, 3]
    assert lowered.as_text().count("func.func private @scaled") == 2
    text = lowered.compile().as_text() or ""
    units = text.count('frontend_attributes={compilation_unit="scaled"}')
    assert (units > 0) == (jax.default_backend() == "cpu" and not in_place)
    expected = functools.reduce(lambda x, factor: jnp.sin(x) * factor, (2, 2, 3, 2), x)
    np.testing.assert_allclose(jax.jit(program)(x), expected, rtol=1e-6)


def test_checks_of_values_are_not_lost_to_a_trace_without_them():
    @outlined()
    def positive(x: jax.Array) -> jax.Array:
        Contract("positive", B=1).holds(x > 0, "is {x}", x=x)
        return x

    twice = lambda x: positive(positive(x))  # noqa: E731
    jax.jit(twice)(-jnp.ones(1))
    with pytest.raises(ValueError, match=r"positive: row 0 is -1\.0"):
        debug_checks(twice)(-jnp.ones(1))
    jax.jit(twice)(-jnp.ones(1))


def test_calls_outside_of_jit_stay_as_they_are():
    scaled, seen = counted()
    for _ in range(2):
        scaled(jnp.ones(2), 5)
    assert seen == [5, 5]


def test_a_trace_under_one_mesh_is_not_used_under_another():
    """Nor without a mesh, nor on a device's own part. Under an equal mesh, it is."""
    seen: list[int] = []

    @outlined()
    def add_sizes(x: jax.Array) -> jax.Array:
        own = len(jax.sharding.get_abstract_mesh().manual_axes)
        seen.append(100 * meshes.size(meshes.DATA) + 10 * meshes.size(meshes.MODEL) + own)
        return x + seen[-1]

    def program(x: jax.Array, split: bool) -> jax.Array:
        return meshes.call_split(add_sizes, (x,), (1,)) if split else add_sizes(add_sizes(x))

    x = jnp.zeros((4, 4))
    places = [(None, 110), ({"data": 2}, 210), ({"model": 2}, 120), ({"data": 2, "model": 2}, 220)]
    traces = []
    for _ in range(2):
        for axes, sizes in places:
            with meshes.use(None if axes is None else meshes.make_mesh(axes)):
                np.testing.assert_array_equal(jax.jit(functools.partial(program, split=False))(x), 2 * sizes)
                own = sizes if axes is None else sizes + 2  # two manual axes
                np.testing.assert_array_equal(jax.jit(functools.partial(program, split=True))(x), own)
        traces.append(len(seen))
    assert set(seen) == {110, 210, 212, 120, 122, 220, 222}
    assert traces[0] == traces[1]
