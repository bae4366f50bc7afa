"""Contracts of array arguments: shapes and dtypes, checked when traced, and ranges, checked if the values are known.

Under `jit` values are not known, and a check of them would cost time: only a function made by `debug_checks` has them.
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

R = TypeVar("R")

FLOATING = ("float32", "bfloat16", "float16")
INT32_MAX = 2**31 - 1

_checks_values = jax.make_user_context(False)  # part of the keys of JAX's caches, unlike a global variable


def debug_checks(function: Callable[..., R]) -> Callable[..., R]:
    """Compiles `function`, as `jax.jit` does, with checks of values that only the run shows.

    For functions of your own that call `append`, `decode`, `extend`, `prefill` or `KVCache.select_rows`. A token that
    finds no room in the cache, or a row, token id or length out of range, raises ValueError after the run. Without
    these checks such a token is dropped, and an index is clipped. The checks cost time: use them to find a mistake.
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
    """What a function expects of its arrays. A letter of a legend, as in "B T K H", is one size in all of them.

    Args:
      function: its name, which errors begin with.
      sizes: those that are known, by letter.
    """

    def __init__(self, function: str, **sizes: int):
        self.function, self.sizes = function, sizes

    def floating(self, name: str, x: Any, legend: str, dtype: DTypeLike | None = None) -> Array:
        """`x`. Raises ValueError unless it has the shape of the legend and `dtype`, or one of `FLOATING`."""
        accepted = FLOATING if dtype is None else (jnp.dtype(dtype).name,)
        text = "float32, bfloat16 or float16" if dtype is None else accepted[0]
        self._check(name, x, legend, text, _dtype_name(x) in accepted)
        return jnp.asarray(x)

    def integers(self, name: str, x: Any, legend: str, at_least: int, at_most: int) -> Array:
        """`x` as int32. Raises ValueError unless it holds integers in the range, in the shape of the legend."""
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
        """Raises ValueError unless the query heads `N` are a multiple of the KV heads `K`."""
        if self.sizes["N"] % self.sizes["K"]:
            given = f"{self.sizes['N']} query heads over {self.sizes['K']} KV heads"
            raise ValueError(f"{self.function}: {given}: expected a multiple")

    def holds(self, condition: Any, text: str, **values: Any) -> None:
        """Raises ValueError with `text`, which names `values` in braces, unless `condition` holds for every row.

        Under `jit` only if `debug_checks` asks for it.
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
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
            raise ValueError(f"{self.function}: {name} was donated to another call: use what that returned")
        letters, shape = legend.split(), getattr(x, "shape", ())
        sizes = {letter: size for letter, size in zip(letters, shape, strict=False) if size} | self.sizes
        if dtype_is_accepted and [sizes.get(letter) for letter in letters] == list(shape):
            self.sizes = sizes
            return
        given = f"{x.dtype}{list(shape)}" if _dtype_name(x) else f"a {type(x).__name__}"
        fixed = "".join(f", {letter}={self.sizes[letter]}" for letter in letters if letter in self.sizes)
        fixed += ", none of size 0" if 0 in shape else ""
        raise ValueError(f"{self.function}: {name} is {given}: expected {accepted} [{', '.join(letters)}]{fixed}")


def _dtype_name(x: Any) -> str:
    """The dtype that an array has inside JAX; empty for what is no array."""
    if not isinstance(x, jax.Array | np.ndarray):
        return ""
    name = str(x.dtype)
    return jax.dtypes.canonicalize_dtype(x.dtype).name if name == "float64" else name


def known(x: Any) -> np.ndarray | None:
    """The values of an array that is not traced and that this process holds; None of any other."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)
