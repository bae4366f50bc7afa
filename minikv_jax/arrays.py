"""Contracts for array arguments: shapes, dtypes and ranges of values.

Shapes and dtypes are checked when a function is traced. Ranges are checked if the values are known. Under `jit` they
are not, and checking them during the run would cost time, so only functions made by `debug_checks` do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import DTypeLike
from jaxtyping import Array

from minikv_jax.checks import shown

R = TypeVar("R")

FLOATING = ("float32", "bfloat16", "float16")
INT32_MAX = 2**31 - 1

_checks_values = jax.make_user_context(False)  # part of the keys of JAX's caches, unlike a global variable


def debug_checks(function: Callable[..., R]) -> Callable[..., R]:
    """Compiles `function` as `jax.jit` does, and adds checks of values that are only known during the run.

    Use it to debug your own functions that call `append`, `decode`, `extend`, `prefill` or `KVCache.select_rows`. The
    checks cost time. Without them, a token without room in the cache is dropped and an index out of range is clipped.

    Args:
      function: takes and returns pytrees of arrays; all arguments are traced.

    Returns:
      A function with the same arguments and results, and with the errors below.

    Raises:
      ValueError: raised by the returned function after a run in which a token had no room, or a row, token id, position
        or length was out of range.
    """

    @jax.jit
    def run(*args: Any, **kwargs: Any) -> Any:
        with _checks_values(True):
            return checkify.checkify(function)(*args, **kwargs)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> R:
        error, result = run(*args, **kwargs)
        if message := error.get():
            raise ValueError(message.removesuffix(" (`check` failed)"))
        return result

    return checked


class Contract:
    """Checks the arrays that a function is given, also against each other.

    A legend such as "B T K H" names the axes of an array. A letter stands for the same size in all arrays.

    Args:
      function: name of the function; error messages begin with it.
      sizes: sizes that are known beforehand, by letter.
    """

    def __init__(self, function: str, **sizes: int):
        self.function, self.sizes = function, sizes

    def floating(self, name: str, x: Any, legend: str, dtype: DTypeLike | None = None) -> Array:
        """Returns `x`. Raises ValueError unless it has the legend's shape and `dtype` (default: any of `FLOATING`)."""
        accepted = FLOATING if dtype is None else (jnp.dtype(dtype).name,)
        text = "float32, bfloat16 or float16" if dtype is None else accepted[0]
        self._check(name, x, legend, text, _dtype_name(x) in accepted)
        return jnp.asarray(x)

    def integers(self, name: str, x: Any, legend: str, at_least: int, at_most: int) -> Array:
        """Returns `x` as int32. Raises ValueError unless it has the legend's shape and holds integers in the range."""
        self._check(name, x, legend, "integers", _dtype_name(x).startswith(("int", "uint")))
        values = known(x)
        if values is not None:
            outside = np.argwhere((values < at_least) | (values > at_most))
            if outside.size:
                at = outside[0].tolist()
                raise ValueError(
                    f"{self.function}: {name}{at} is {values[tuple(at)]}: expected integers in {at_least}..{at_most}"
                )
        elif _checks_values.value:
            text = f"{self.function}: {name} lies in {{low}}..{{high}}: expected integers in {at_least}..{at_most}"
            low, high = jnp.min(x), jnp.max(x)
            checkify.check((low >= at_least) & (high <= at_most), text, low=low, high=high)
        return jnp.asarray(x).astype(jnp.int32)

    def heads(self) -> None:
        """Raises ValueError unless the number of query heads `N` is a multiple of the number of KV heads `K`."""
        if self.sizes["N"] % self.sizes["K"]:
            given = f"{self.sizes['N']} query heads over {self.sizes['K']} KV heads"
            raise ValueError(f"{self.function}: {given}: expected a multiple")

    def holds(self, condition: Any, text: str, **values: Any) -> None:
        """Raises ValueError unless `condition` holds for every row. Under `jit`, only `debug_checks` checks it.

        Args:
          condition: bool `[B]`.
          text: the error message; names of `values` in braces are replaced by the row's values.
          values: arrays `[B]`, by name.
        """
        if (rows := known(condition)) is not None:
            if not rows.all():
                row = int(np.argmin(rows))
                numbers = {name: np.asarray(value)[row] for name, value in values.items()}
                raise ValueError(f"{self.function}: row {row} {text.format(**numbers)}")
        elif _checks_values.value:
            row = jnp.argmin(condition)
            numbers = {name: value[row] for name, value in values.items()}
            checkify.check(jnp.all(condition), f"{self.function}: row {{row}} {text}", row=row, **numbers)

    def _check(self, name: str, x: Any, legend: str, accepted: str, dtype_is_accepted: bool) -> None:
        if isinstance(x, jax.Array) and not is_traced(x) and x.is_deleted():
            raise ValueError(f"{self.function}: {name} was donated to another call: use the array that it returned")
        letters, shape = legend.split(), getattr(x, "shape", ())
        sizes = {letter: size for letter, size in zip(letters, shape, strict=False) if size} | self.sizes
        if dtype_is_accepted and [sizes.get(letter) for letter in letters] == list(shape):
            self.sizes = sizes
            return
        given = f"{x.dtype}{list(shape)}" if _dtype_name(x) else f"a {type(x).__name__}"
        fixed = "".join(f", {letter}={self.sizes[letter]}" for letter in letters if letter in self.sizes)
        fixed += ", none of size 0" if 0 in shape else ""
        raise ValueError(f"{self.function}: {name} is {given}: expected {accepted} [{', '.join(letters)}]{fixed}")


def resolve_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Returns a dtype by its name or type. Raises ValueError unless it is one of `FLOATING`."""
    try:
        resolved = jnp.dtype("none" if dtype is None else dtype)  # None would be float64
    except TypeError as error:
        raise ValueError(f"dtype={shown(dtype)}: expected one of {', '.join(FLOATING)}") from error
    if resolved.name not in FLOATING:
        raise ValueError(f"dtype={resolved.name!r}: expected one of {', '.join(FLOATING)}")
    return resolved


def _dtype_name(x: Any) -> str:
    """Returns the dtype that an array has inside JAX; an empty string if `x` is not an array."""
    if not isinstance(x, jax.Array | np.ndarray):
        return ""
    name = str(x.dtype)
    return jax.dtypes.canonicalize_dtype(x.dtype).name if name == "float64" else name


def known(x: Any) -> np.ndarray | None:
    """Returns the values of an array, or None if it is traced or not entirely in this process."""
    if is_traced(x) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def is_traced(x: Any) -> bool:
    """Whether `x` stands for an array whose values only a run knows."""
    return isinstance(x, Tracer)
