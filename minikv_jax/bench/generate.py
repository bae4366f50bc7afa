"""End-to-end benchmark of generation; every run has its own process.

A run's floor is the time that the device takes to read the weights and the valid part of the cache at its measured rate
(`timing.rates`). No decode step can be faster.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from minikv_jax.bench import huggingface, timing, trace
from minikv_jax.bench.end_to_end import Case, Programs, measure
from minikv_jax.bench.fit import FIELDS, find
from minikv_jax.bench.worker import FAILURES, run_task
from minikv_jax.models import packaged

_PACKAGES = ("jax", "jaxlib", "flax")
_PROBE_MEMORY_FRACTION = 0.5  # for the probe process
_DEFAULT_MEMORY_FRACTION = 0.97  # for a run without a limit
_REGION_BYTES = 1 << 21  # the allocator rounds its memory up to a multiple
_OOM_BACKOFF = 0.98  # shrink factor of a size after an out-of-memory run


def memory_fraction(limit: int, total: int) -> float:
    """Fraction of a device's memory, in millionths, that the allocator does not round up beyond `limit` bytes."""
    return math.floor(1e6 * (limit // _REGION_BYTES * _REGION_BYTES) / total) / 1e6


# Each of these runs in its own process, with JSON values.


def probe_device() -> dict[str, Any]:
    """Device, how many there are, backend, memory in bytes, and the rates at which the device reads and copies.

    Memory and rates are None without a GPU or without the CUDA library.
    """
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    try:
        rates = timing.rates()
    except NotImplementedError as error:
        rates = {"read_bytes_per_s": None, "copy_bytes_per_s": None, "no_rates": str(error)}
    return {
        "device": first.device_kind,
        "devices": jax.device_count(),
        "backend": first.client.platform_version.splitlines()[0],
        "memory_bytes": None if limit is None else round(limit / _PROBE_MEMORY_FRACTION),
        **rates,
    }


def measure_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measures a case, with clocks and power after it; Hugging Face's methods run in its own library."""
    row = (huggingface.measure if case["method"] in huggingface.METHODS else measure)(Case(**case))
    return row | {"clocks": timing.clocks()}


def compile_case(case: dict[str, Any]) -> dict[str, float]:
    """Compiles a case's programs into the compilation cache, and returns the seconds that each took."""
    return Programs(Case(**case)).compile_s


def find_size(case: dict[str, Any], what: str, limit: int) -> dict[str, Any]:
    """Finds the largest size of a case within a memory limit."""
    return find(Case(**case), what, limit)


class Bench:
    """Runs cases one after the other and keeps the report.

    Args:
      command: recorded in the report.
      memory_gb: limit of each run; None lets a run use most of the device.
    """

    def __init__(self, command: str, memory_gb: float | None):
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR")
            or str(packaged.cache_directory() / "compiled"),
        }
        about = self.run_task(probe_device, fraction=_PROBE_MEMORY_FRACTION)
        self.limit = None if memory_gb is None else round(memory_gb * 1e9)
        total = about["memory_bytes"]
        if self.limit is not None and total is not None and self.limit > total:
            raise ValueError(f"--memory-gb {memory_gb:g}: this device has {total / 1e9:.1f} GB")
        self.fraction = memory_fraction(self.limit, total) if self.limit and total else _DEFAULT_MEMORY_FRACTION
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self.report: dict[str, Any] = {"command": command, **about, "versions": versions, "results": []}

    def run_task(
        self, function: Callable[..., Any], *arguments: Any, fraction: float | None = None, seconds: float | None = None
    ) -> Any:
        """Calls a function in a new process (`worker.run_task`), with a fraction of the device's memory."""
        environment = self.environment | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self.fraction if fraction is None else fraction:.6f}",
            # One region for all that a run allocates, so that a batch that fills the device is not lost to fragments.
            "XLA_PYTHON_CLIENT_PREALLOCATE": str(function.__name__.startswith("measure")).lower(),
        }
        if function is trace.measure:  # a cached program of older sources would name other scopes
            environment["JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY"] = "true"
        return run_task(function, *arguments, environment=environment, seconds=seconds)

    def compile_ahead(self, cases: Sequence[Case], jobs: int, seconds: float | None = None) -> None:
        """Compiles all cases, `jobs` at a time, within `seconds`. Running the case reports its errors."""
        end = None if seconds is None else time.monotonic() + seconds

        def compile_one(case: Case) -> None:
            left = None if end is None else end - time.monotonic()
            if left is None or left > 0:
                with contextlib.suppress(*FAILURES):
                    self.run_task(compile_case, dataclasses.asdict(case), seconds=left)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, cases))

    def row(self, case: Case) -> dict[str, Any]:
        """Measures a case, and returns a row of its sizes with the results or the error."""
        return self.complete(case, self._attempt(case, measure_case))

    def complete(self, case: Case, measured: dict[str, Any]) -> dict[str, Any]:
        """Adds a case's sizes and the hardware's floor to what was measured."""
        row = self._sizes(case) | measured
        if "error" in row:
            return row
        for stretch in row["decode"].values():
            stretch |= self._floor(stretch["device_bytes_read"], stretch["ms_per_step"])
        return row | {"times_floor": next(iter(row["decode"].values()))["times_floor"]}

    def traced(self, case: Case, of_prefill: bool, seconds: float | None = None) -> dict[str, Any]:
        """Traces a case, and returns a row of its sizes with the breakdown or the error."""
        rate = self.report["read_bytes_per_s"]
        return self._sizes(case) | self._attempt(case, trace.measure, of_prefill, rate, seconds=seconds)

    def _sizes(self, case: Case) -> dict[str, Any]:
        sizes = {name: value for name, value in dataclasses.asdict(case).items() if value is not None}
        return sizes | {"memory_limit_bytes": self.limit}

    def _attempt(
        self, case: Case, function: Callable[..., Any], *arguments: Any, seconds: float | None = None
    ) -> dict[str, Any]:
        """What `function` returns for a case, or the error."""
        try:
            return self.run_task(function, dataclasses.asdict(case), *arguments, seconds=seconds)
        except FAILURES as error:
            return {"error": str(error)}

    def _floor(self, bytes_read: int, ms: float) -> dict[str, float | None]:
        """The floor of a decode step, from the bytes that each device reads, and the ratio of its time to the floor."""
        rate = self.report["read_bytes_per_s"]
        if rate is None:
            return {"floor_ms": None, "times_floor": None}
        floor = 1e3 * bytes_read / rate
        return {"floor_ms": floor, "times_floor": ms / floor}

    def fitted(self, case: Case, what: str) -> dict[str, Any]:
        """Measures the largest batch or the longest prompt within the limit, reduced until it runs."""
        search = self.run_task(find_size, dataclasses.asdict(case), what, self.limit)
        size, failed = search["size"], []
        while True:
            row = self.row(dataclasses.replace(case, **{FIELDS[what]: size}))
            row["found"] = search | {"out_of_memory": failed}
            if "out of memory" not in row.get("error", "") or size == 1:
                return row
            failed.append(size)
            size = min(size - 1, int(size * _OOM_BACKOFF))


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    devices = f" on {row['mesh']}" if "mesh" in row else ""
    sizes = f"batch {row['batch']:4} prompt {row['prompt_len']:7,} + {row['max_new_tokens']:5,}"
    text = f"{row['method']:12}{devices} {sizes}: "
    if "error" in row:
        return text + row["error"]
    floor = "" if row["times_floor"] is None else f" ({row['times_floor']:.2f}x floor)"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e9:.2f} GB"
    gain = f", {row['step_ratio']:.3f}x one device's step" if "step_ratio" in row else ""
    return (
        f"{text}prefill {row['prefill_s']:.3f} s, decode {row['decode_ms']:.2f} ms per step{floor}{gain}, "
        f"{row['decode_tokens_per_s']:,.0f} tokens/s{peak}, cache {row['cache_bytes'] / 1e9:.3f} GB, "
        f"compile {sum(row['compile_s'].values()):.0f} s"
    )
