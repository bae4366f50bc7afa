"""Votes of the last queries: the kernels against plain JAX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from minikv_jax.bench.prompts import PromptShape
from minikv_jax.bench.timing import Benchmark, Row, alternating_ms
from minikv_jax.ops.window_votes import window_votes

_IMPLEMENTATIONS = ("cuda", "xla")

# Prompts, and the windows of last queries that vote.
CASES = (
    (PromptShape(1, 4096, 32, 32), (16, 256)),
    (PromptShape(1, 4096, 32, 32), (32,)),
    (PromptShape(1, 32768, 32, 8), (16, 256)),
    (PromptShape(8, 4096, 32, 32), (16, 256)),
)


def bench_votes(shape: PromptShape, windows: tuple[int, ...]) -> Benchmark:
    """A row per implementation."""
    q, k, _, lengths = shape.abstract()
    vote = functools.partial(window_votes, sizes=windows)
    programs = {x: jax.jit(functools.partial(vote, implementation=x)).lower(q, k, lengths) for x in _IMPLEMENTATIONS}
    return Benchmark(programs, functools.partial(_measure, shape, windows))


def _measure(shape: PromptShape, windows: tuple[int, ...], programs: Mapping[str, Any]) -> Iterator[Row]:
    q, k, _, lengths = shape.random()
    times = alternating_ms(*((programs[name], (q, k, lengths)) for name in _IMPLEMENTATIONS))
    name = f"{shape.name} W{'+'.join(map(str, windows))}"
    sizes = dataclasses.asdict(shape) | {"queries": windows[-1]}
    for implementation, ms in zip(_IMPLEMENTATIONS, times, strict=True):
        yield {"op": "window_votes", "shape": name, "sizes": sizes, "implementation": implementation, "ms": ms}
