"""Tests the contracts of array arguments and `debug_checks` of their values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minikv_jax.arrays import Contract, debug_checks


def test_a_letter_is_one_size_in_all_arrays():
    contract = Contract("f", H=8)
    contract.floating("q", jnp.zeros((2, 4, 8)), "B N H")
    contract.floating("k", np.zeros((2, 2, 8), jnp.bfloat16), "B K H")
    contract.heads()
    assert contract.sizes == {"B": 2, "N": 4, "K": 2, "H": 8}
    for shape in ((3, 2, 8), (2, 2, 4), (2, 8), (2, 2, 8, 1), (2, 2, 0)):
        with pytest.raises(ValueError, match=r"^f: v is float32\[.*\]: expected .* \[B, K, H\], B=2, K=2, H=8"):
            contract.floating("v", jnp.zeros(shape), "B K H")
    contract.sizes["N"] = 3
    with pytest.raises(ValueError, match=r"^f: 3 query heads over 2 KV heads: expected a multiple$"):
        contract.heads()


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (jnp.zeros(2, jnp.int32), r"int32\[2\]"),
        (np.zeros(2, complex), r"complex128\[2\]"),
        (np.array(["a", "b"]), r"<U1\[2\]"),
        (np.array([None, 1]), r"object\[2\]"),
        (jax.random.split(jax.random.key(0)), r"key<fry>\[2\]"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "a ShapeDtypeStruct"),
        ([1.0, 2.0], "a list"),
        (1.0, "a float"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_floating_point_array_is_named(x: Any, given: str):
    with pytest.raises(ValueError, match=rf"^f: x is {given}: expected float32, bfloat16 or float16 \[A\]$"):
        Contract("f").floating("x", x, "A")


def test_numpys_wide_numbers_are_jaxs():
    """float64 becomes float32 and int64 becomes int32, as in JAX; numbers beyond int32 are refused."""
    contract = Contract("f")
    assert contract.floating("x", np.zeros(2), "A").dtype == jnp.float32
    assert contract.integers("n", np.arange(2), "A", 0, 5).dtype == jnp.int32
    assert contract.integers("n", np.arange(2, dtype=np.uint8), "A", 0, 5).dtype == jnp.int32
    with pytest.raises(ValueError, match=r"^f: n\[1\] is 4294967297: expected integers in 0..5$"):
        contract.integers("n", np.array([1, 2**32 + 1]), "A", 0, 5)


def test_a_donated_array_is_named():
    x = jnp.zeros(2)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    with pytest.raises(ValueError, match=r"^f: x was donated to another call"):
        Contract("f").floating("x", x, "A")


def shifted(n: jax.Array, room: jax.Array) -> jax.Array:
    contract = Contract("f")
    n = contract.integers("n", n, "B", 0, 4)
    contract.holds(n <= room, "takes {n} of {room}", n=n, room=room)
    return n + 1


CASES = [
    (np.array([1, 9]), r"^f: n(\[1\] is 9| lies in 1..9): expected integers in 0..4$"),
    (np.array([-1, 2]), r"^f: n(\[0\] is -1| lies in -1..2): expected integers in 0..4$"),
    (np.array([1, 4]), "^f: row 1 takes 4 of 3$"),
]


@pytest.mark.parametrize(
    "call", [shifted, debug_checks(shifted), debug_checks(jax.jit(shifted))], ids=["eager", "checked", "nested"]
)
def test_values_are_checked_where_they_are_known(call: Callable[..., jax.Array]):
    room = jnp.array([3, 3])
    np.testing.assert_array_equal(call(np.array([0, 3]), room), [1, 4])
    for n, message in CASES:
        with pytest.raises(ValueError, match=message):
            call(n, room)


def test_under_jit_nothing_is_checked_and_nothing_is_paid():
    """Values are not checked under `jit`, only shapes. With checks, a compiled function is compiled again."""
    plain = jax.jit(shifted)
    room = jnp.array([3, 3], jnp.int32)
    np.testing.assert_array_equal(plain(jnp.array([1, 9]), room), [2, 10])
    with pytest.raises(ValueError, match=r"^f: row 1 takes 4 of 3$"):
        debug_checks(plain)(jnp.array([1, 4]), room)
    np.testing.assert_array_equal(plain(jnp.array([1, 9]), room), [2, 10])
    assert "compare" not in str(plain.lower(jnp.array([1, 9]), room).compile().as_text())


def test_loops_are_checked():
    def steps(room: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, n: shifted(n, room), jnp.array([0, 1]))

    assert debug_checks(steps)(jnp.array([4, 4])).tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"^f: row 1 takes 3 of 2$"):
        debug_checks(steps)(jnp.array([4, 2]))
