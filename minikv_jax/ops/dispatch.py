"""Selects an implementation for each op: by name, or the fastest by recorded times.

An op has a table of functions with the same arguments, by name of the implementation: "xla" (plain JAX, runs
everywhere), "pallas" and "cuda". If a kernel cannot run a case, its adapter raises NotImplementedError with the reason
before any work starts. The kernel packages are imported on first use. They import nothing of this package, which also
runs without them.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import jax

from minikv_jax import meshes

IMPLEMENTATIONS = ("xla", "pallas", "cuda")
_KERNELS_FIRST = ("cuda", "pallas", "xla")
_TIMING_TOLERANCE = 1.05  # ratio of one kernel's times in two runs; within it, _KERNELS_FIRST decides
RESULTS = pathlib.Path(__file__).parents[1] / "bench" / "results"  # written by `bench`, one file per device

_log = logging.getLogger("minikv_jax")
Result = TypeVar("Result")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or one of `IMPLEMENTATIONS`."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def run(
    op: str,
    implementation: str | None,
    sizes: Mapping[str, int],
    implementations: Mapping[str, Callable[..., Result]],
    *arguments: Any,
    heads: tuple[int | None, ...] = (),
    outputs: Any = None,
) -> Result:
    """Runs an op with the named implementation, or with the fastest one that supports the case.

    Args:
      op: name of the op.
      implementation: a name, which then runs or raises; None tries those of `order(op, sizes)` in turn.
      sizes: sizes by which the nearest recorded measurement is found.
      implementations: functions of `arguments`, by name.
      arguments: arguments of the op.
      heads, outputs: axes of the heads, for meshes (`meshes.call_split`).

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: the named implementation cannot run this case, or none can; the text gives all reasons.
    """
    check_implementation(implementation)
    if implementation is not None:
        if implementation not in implementations:
            raise NotImplementedError(f"{op}: no {implementation!r} kernel; implementation='xla' runs everywhere")
        return meshes.call_split(implementations[implementation], arguments, heads, outputs)
    reasons = []
    for name in order(op, _on_one_device(sizes)):
        if name not in implementations:
            continue
        try:
            result = meshes.call_split(implementations[name], arguments, heads, outputs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            _log.info("%s %s: not %s: %s", op, dict(sizes), name, error)
            continue
        _log.info("%s %s: %s", op, dict(sizes), name)
        return result
    raise NotImplementedError(f"{op}: no implementation supports the case: {'; '.join(reasons)}")


def _on_one_device(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of each device's part."""
    parts = {"batch": meshes.DATA, "heads": meshes.MODEL, "kv_heads": meshes.MODEL}
    return {name: size // meshes.size(parts[name]) if name in parts else size for name, size in sizes.items()}


def order(op: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Orders the implementations to try, fastest first at the nearest recorded shape. Near ties favour kernels.

    Uses measurements of this kind of device or, if there are none, of its compute capability.
    """
    if jax.default_backend() != "gpu":
        return ("xla",)
    device = jax.devices()[0]
    rows = [row for row in recorded(device.device_kind, device.compute_capability) if row["op"] == op]
    if not rows:
        return _KERNELS_FIRST
    nearest = min((row["sizes"] for row in rows), key=lambda recorded: _distance(recorded, sizes))
    # Rows may have equal sizes (and pack along different axes, for example): take an implementation's mean.
    measured: dict[str, list[float]] = {}
    for row in rows:
        if row["sizes"] == nearest:
            measured.setdefault(row["implementation"], []).append(row["ms"])
    times = {name: statistics.mean(ms) for name, ms in measured.items()}
    tied = _TIMING_TOLERANCE * min(times.values())

    def rank(name: str) -> tuple[float, int]:
        time = times.get(name, math.inf)
        return (0.0 if time <= tied else time, _KERNELS_FIRST.index(name))

    return tuple(sorted(_KERNELS_FIRST, key=rank))


def package(implementation: str) -> ModuleType:
    """Imports the kernel package of an implementation."""
    return importlib.import_module({"pallas": "pallas_kernels", "cuda": "cuda_ffi"}[implementation])


@functools.cache
def recorded(device_kind: str, compute_capability: str, results: pathlib.Path = RESULTS) -> tuple[dict, ...]:
    """Reads benchmark rows of this kind of device or, if there are none, of one with the same compute capability."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("kernels_*.json"))]
    own = [report for report in reports if report["device"] == device_kind]
    related = [report for report in reports if report["compute_capability"] == compute_capability]
    return tuple(row for report in (own or related)[:1] for row in report["results"])


def _distance(recorded: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log2(max(recorded[name], 1) / max(sizes[name], 1))) for name in sizes if name in recorded)
