"""Outlined functions: a program of many equal layers holds each of them once.

Layers are unrolled, so what a program costs to compile grows with them. A function that all layers call with equal
shapes is traced once and lowered once. XLA inlines such calls. On a CPU, it is asked to optimise the body by itself
first, as one compilation unit for all calls, which saves most of its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from minikv_jax.arrays import is_traced

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outlined(
    *static: str, in_place: bool = False
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes a decorator for functions that many layers call. Outside of `jit`, calls stay as they are.

    Named scopes around a call do not reach into the body: the function needs its own. A trace is kept for the process,
    so it may depend on arguments and on JAX's context, not on other globals, and what it logs is logged once.

    Args:
      static: names of the function's arguments that are not pytrees of arrays. They must be hashable.
      in_place: whether the function updates its arguments. A compilation unit would update copies of them.

    Returns:
      The decorator.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        traced_once = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not any(map(is_traced, jax.tree.leaves((args, kwargs)))):
                return function(*args, **kwargs)
            result = traced_once(*args, **kwargs)
            return result if in_place or not _has_units() else _mark(result, function.__name__)

        return call

    return decorate


def _has_units() -> bool:
    """Whether XLA may split the program into compilation units: on a single CPU device."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty


def _mark(result: Result, name: str) -> Result:
    """Makes the call that computed `result` one of a compilation unit. Any of its results stands for the call."""
    leaves, tree = jax.tree.flatten(result)
    return jax.tree.unflatten(tree, [set_xla_metadata(leaves[0], compilation_unit=name), *leaves[1:]])
