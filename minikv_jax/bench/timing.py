"""How long device work takes, and the rates of the device that it is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

from cuda_ffi.bandwidth import read_checksum

_RUNS = 15
_CHAINS = (8, 40)
_LOOP = 1000


def kernel_ms(function: Callable[..., Any], *arguments: Any) -> float:
    """Median over warm runs of the device time of a call, the sum of its kernels, in ms."""
    compiled = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(compiled(*arguments))
    _, times = profiler.measure(compiled, iterations=_RUNS)(*arguments)
    return statistics.median(float(t) for t in times or ())


def chained_ms(step: Callable[..., jax.Array], start: jax.Array, *arguments: Any) -> float:
    """Time of one of many calls that each wait for the one before, in one program, in ms.

    The gaps between kernels count, what a program costs once does not: the difference of a long and a short chain.
    """
    medians = []
    for calls in _CHAINS:

        def chain(x: jax.Array, *arguments: Any, calls: int = calls) -> jax.Array:
            for _ in range(calls):
                x = step(x, *arguments)
            return x

        medians.append(_wall_ms(jax.jit(chain), start, *arguments))
    return (medians[1] - medians[0]) / (_CHAINS[1] - _CHAINS[0])


def looped_ms(step: Callable[..., jax.Array], start: jax.Array, *arguments: Any) -> float:
    """Time of one of 1000 calls inside `lax.fori_loop`, in ms."""
    looped = jax.jit(lambda x, *rest: lax.fori_loop(0, _LOOP, lambda _, x: step(x, *rest), x))
    return _wall_ms(looped, start, *arguments, runs=3) / _LOOP


def _wall_ms(function: Callable[..., Any], *arguments: Any, runs: int = _RUNS) -> float:
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def rates() -> dict[str, float]:
    """Bytes a second this device reads, and copies (read plus written)."""
    words = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    read = words.nbytes / kernel_ms(read_checksum, words) * 1e3
    copy = 2 * words.nbytes / kernel_ms(lambda x: x ^ 1, words) * 1e3
    return {"read_bytes_per_s": read, "copy_bytes_per_s": copy}
