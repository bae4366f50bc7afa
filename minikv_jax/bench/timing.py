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
_CHAIN, _REPEATS = 40, 10
_LOOP = 1000


def kernel_ms(function: Callable[..., Any], *arguments: Any) -> float:
    """Median over warm runs of the device time of a call, the sum of its kernels, in ms."""
    compiled = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(compiled(*arguments))
    _, times = profiler.measure(compiled, iterations=_RUNS)(*arguments)
    return statistics.median(float(t) for t in times or ())


def chained_ms(step: Callable[..., jax.Array], start: jax.Array, *arguments: Any) -> float:
    """Time of one of many calls that each wait for the one before, in ms; the gaps between kernels count.

    A program of many calls runs again and again without a wait between. It gets its own result as its input, donated,
    so that it keeps its buffers and its CUDA graph, as a decode loop does.
    """

    def chain(x: jax.Array, *arguments: Any) -> jax.Array:
        for _ in range(_CHAIN):
            x = step(x, *arguments)
        return x

    compiled = jax.jit(chain, donate_argnums=0)
    x = jax.block_until_ready(compiled(compiled(jnp.copy(start), *arguments), *arguments))
    times = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            x = compiled(x, *arguments)
        jax.block_until_ready(x)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times) / (_CHAIN * _REPEATS)


def looped_ms(step: Callable[..., jax.Array], start: jax.Array, *arguments: Any) -> float:
    """Time of one of 1000 calls inside `lax.fori_loop`, in ms."""
    looped = jax.jit(lambda x, *rest: lax.fori_loop(0, _LOOP, lambda _, x: step(x, *rest), x))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(looped(start, *arguments))
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[2:]) / _LOOP


def rates() -> dict[str, float]:
    """Bytes a second this device reads, and copies (read plus written)."""
    words = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    read = words.nbytes / kernel_ms(read_checksum, words) * 1e3
    copy = 2 * words.nbytes / kernel_ms(lambda x: x ^ 1, words) * 1e3
    return {"read_bytes_per_s": read, "copy_bytes_per_s": copy}
