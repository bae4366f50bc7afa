"""Selects an implementation for each op: as asked, or by recorded times.

An op has a table of functions of the same arguments, by the implementation's name: "xla" (plain JAX, anywhere) and what
kernels there are. A kernel's adapter raises NotImplementedError with the reason if it cannot run a case, before any
work. The kernel packages are imported on first use: they need nothing of this one, and this one runs without them.
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
_TIMING_TOLERANCE = 1.05  # times of one kernel in two runs differ by as much; within it, _KERNELS_FIRST decides
RESULTS = pathlib.Path(__file__).parents[1] / "bench" / "results"  # of `bench`, a file per device

_log = logging.getLogger("minikv_jax")
Result = TypeVar("Result")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it is None or one of `IMPLEMENTATIONS`."""
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
    """Runs an op as asked, or by the fastest implementation that supports the case.

    Args:
      op: its name.
      implementation: one by name, which then runs or raises; None tries `order(op, sizes)` one after the other.
      sizes: tells the recorded measurements apart.
      implementations: functions of `arguments` by name.
      heads, outputs: where the heads are, for meshes (`meshes.call_split`).

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: a named one that cannot run this case; or no one can, with every implementation's reason.
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
    """The sizes of each device's part."""
    parts = {"batch": meshes.DATA, "heads": meshes.MODEL, "kv_heads": meshes.MODEL}
    return {name: size // meshes.size(parts[name]) if name in parts else size for name, size in sizes.items()}


def order(op: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Implementations to try, best first: by the nearest recorded shape, kernels before XLA.

    Measurements of this kind of device count or, if there are none, those of its compute capability.
    """
    if jax.default_backend() != "gpu":
        return ("xla",)
    device = jax.devices()[0]
    rows = [row for row in recorded(device.device_kind, device.compute_capability) if row["op"] == op]
    if not rows:
        return _KERNELS_FIRST
    nearest = min((row["sizes"] for row in rows), key=lambda recorded: _distance(recorded, sizes))
    # Sizes do not tell all rows apart (the axis packed along, for example): an implementation's mean counts.
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
    """The kernel package of an implementation."""
    return importlib.import_module({"pallas": "pallas_kernels", "cuda": "cuda_ffi"}[implementation])


@functools.cache
def recorded(device_kind: str, compute_capability: str, results: pathlib.Path = RESULTS) -> tuple[dict, ...]:
    """Benchmark rows of this kind of device or, if there are none, of one of the same compute capability."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("kernels_*.json"))]
    own = [report for report in reports if report["device"] == device_kind]
    related = [report for report in reports if report["compute_capability"] == compute_capability]
    return tuple(row for report in (own or related)[:1] for row in report["results"])


def _distance(recorded: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log2(max(recorded[name], 1) / max(sizes[name], 1))) for name in sizes if name in recorded)
