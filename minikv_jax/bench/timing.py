"""Times work on the device, and measures the rates at which the device reads and copies."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler

import cuda_ffi
from cuda_ffi.bandwidth import read_checksum

_KERNEL_RUNS = 15
_CALLS_PER_CHAIN, _CHAINS_PER_RUN, _CHAIN_RUNS = 40, 5, 9
_CALLS_PER_LOOP = 1000  # a multiple of _CALLS_PER_CHAIN
_CALLS_PER_TURN, _TURNS = 32, 5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The programs that time one shape.

    Attributes:
      programs: by name, not compiled yet.
      measure: makes the shape's rows with the compiled programs.
    """

    programs: Mapping[str, jax.stages.Lowered]
    measure: Callable[[Mapping[str, jax.stages.Compiled]], Iterator[Row]]


def run(benchmarks: Iterable[Benchmark]) -> Iterator[Row]:
    """Yields every row, with `clocks` after it.

    All programs are compiled side by side first, because compiling would disturb the times.
    """
    with ThreadPoolExecutor() as pool:
        compiling = [
            (benchmark.measure, {name: pool.submit(x.compile) for name, x in benchmark.programs.items()})
            for benchmark in benchmarks
        ]
    for measure, programs in compiling:
        for row in measure({name: program.result() for name, program in programs.items()}):
            yield row | {"clocks": clocks()}


def kernel_ms(program: Callable[..., Any], *arguments: Any) -> float:
    """Median device time per call in milliseconds (sum over kernels, warm runs)."""
    for _ in range(2):
        jax.block_until_ready(program(*arguments))
    _, times = profiler.measure(program, iterations=_KERNEL_RUNS)(*arguments)
    return statistics.median(float(t) for t in times or ())


def alternating_ms(*calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[float]:
    """`kernel_ms` of several compiled programs with their arguments, taken in turns.

    Busy tensor cores make the device lower its clock within a few calls, so times of long calls compare only if they
    are taken in turns. A turn has as many calls as a model has layers.
    """
    turns = [
        [profiler.measure(program, iterations=_CALLS_PER_TURN)(*arguments)[1] for program, arguments in calls]
        for _ in range(_TURNS)
    ]
    return [statistics.median(float(ms) for turn in own for ms in turn or ()) for own in zip(*turns, strict=True)]


def chain(step: Callable[..., jax.Array], start: Any, *arguments: Any) -> jax.stages.Lowered:
    """Lowers a program of many dependent calls, whose input is donated.

    Its result is its next input, so it keeps its buffers and its CUDA graph, as a decode loop does.
    """

    def calls(x: jax.Array, *arguments: Any) -> jax.Array:
        for _ in range(_CALLS_PER_CHAIN):
            x = step(x, *arguments)
        return x

    return jax.jit(calls, donate_argnums=0).lower(start, *arguments)


def chained_ms(program: Any, start: jax.Array, *arguments: Any) -> float:
    """Time per call in a compiled `chain` in milliseconds, gaps between kernels included.

    The program runs repeatedly without waiting in between.
    """
    x = jax.block_until_ready(program(program(jnp.copy(start), *arguments), *arguments))
    times = []
    for _ in range(_CHAIN_RUNS):
        begin = time.perf_counter()
        for _ in range(_CHAINS_PER_RUN):
            x = program(x, *arguments)
        jax.block_until_ready(x)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times) / (_CALLS_PER_CHAIN * _CHAINS_PER_RUN)


def loop(step: Callable[..., jax.Array], start: Any, *arguments: Any) -> jax.stages.Lowered:
    """Lowers a program of many calls inside `lax.fori_loop`."""
    return jax.jit(lambda x, *rest: lax.fori_loop(0, _CALLS_PER_LOOP, lambda _, x: step(x, *rest), x)).lower(
        start, *arguments
    )


def extra_in_loop_ms(looped: Any, chained: Any, start: jax.Array, *arguments: Any) -> float:
    """Extra time per call in a compiled `loop`, compared with a `chain`, in milliseconds.

    The two take turns with equally many calls, because the device's clock drifts by more than a loop costs.
    """
    jax.block_until_ready(looped(start, *arguments))
    x = jax.block_until_ready(chained(jnp.copy(start), *arguments))
    extra = []
    for _ in range(_TURNS):
        begin = time.perf_counter()
        for _ in range(_CALLS_PER_LOOP // _CALLS_PER_CHAIN):
            x = chained(x, *arguments)
        jax.block_until_ready(x)
        between = time.perf_counter()
        jax.block_until_ready(looped(start, *arguments))
        extra.append((time.perf_counter() - between) - (between - begin))
    return 1e3 * statistics.median(extra) / _CALLS_PER_LOOP


def clocks() -> dict[str, float] | None:
    """Clocks of multiprocessors and memory in MHz, and power in watts, of the first GPU; None without nvidia-smi."""
    fields = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_w"}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return dict(zip(fields.values(), map(float, answer.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):  # no nvidia-smi, no such GPU, or "[N/A]"
        return None


def rates() -> dict[str, float]:
    """Bytes per second that this device reads, and that it copies (read plus written).

    Raises:
      NotImplementedError: the CUDA kernels cannot run here.
    """
    if reason := cuda_ffi.why_unavailable():
        raise NotImplementedError(reason)
    words = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    read = words.nbytes / kernel_ms(jax.jit(read_checksum), words) * 1e3
    copy = 2 * words.nbytes / kernel_ms(jax.jit(lambda x: x ^ 1), words) * 1e3
    return {"read_bytes_per_s": read, "copy_bytes_per_s": copy}
