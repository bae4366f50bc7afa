"""Votes of the last queries: the kernels against plain JAX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from minikv_jax.bench.timing import Benchmark, Row, alternating_ms
from minikv_jax.ops.window_votes import window_votes

_IMPLEMENTATIONS = ("cuda", "xla")


@dataclasses.dataclass(frozen=True)
class VotesShape:
    """A batch of prompts of `tokens` tokens each, and the windows of last queries that vote."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    windows: tuple[int, ...]
    head_dim: int = 128

    @property
    def name(self) -> str:
        windows = "+".join(map(str, self.windows))
        return f"B{self.batch} S{self.tokens} N{self.heads} K{self.kv_heads} H{self.head_dim} W{windows}"


SHAPES = (
    VotesShape(1, 4096, 32, 32, (16, 256)),
    VotesShape(1, 4096, 32, 32, (32,)),
    VotesShape(1, 32768, 32, 8, (16, 256)),
    VotesShape(8, 4096, 32, 32, (16, 256)),
)


def bench_votes(shape: VotesShape) -> Benchmark:
    """A row per implementation."""
    q, k = (
        jax.ShapeDtypeStruct((shape.batch, shape.tokens, heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    lengths = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    vote = functools.partial(window_votes, sizes=shape.windows)
    programs = {x: jax.jit(functools.partial(vote, implementation=x)).lower(q, k, lengths) for x in _IMPLEMENTATIONS}
    return Benchmark(programs, functools.partial(_measure, shape, (q, k)))


def _measure(shape: VotesShape, like: tuple[Any, ...], programs: Mapping[str, Any]) -> Iterator[Row]:
    q, k = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(like))
    arguments = q, k, jnp.full((shape.batch,), shape.tokens, jnp.int32)
    times = alternating_ms(*((programs[name], arguments) for name in _IMPLEMENTATIONS))
    sizes = dataclasses.asdict(shape) | {"queries": shape.windows[-1]}
    del sizes["windows"]
    for name, ms in zip(_IMPLEMENTATIONS, times, strict=True):
        yield {"op": "window_votes", "shape": shape.name, "sizes": sizes, "implementation": name, "ms": ms}
