"""Tests that an outlined function is in a program once, and that calls outside of programs stay as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
