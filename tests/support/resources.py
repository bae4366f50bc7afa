"""Records peak memory and memory maps of the test processes, which compile thousands of programs."""

from __future__ import annotations

import pathlib
import resource
from typing import NamedTuple

_MAPS, _LIMIT = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")


class Peaks(NamedTuple):
    """Peaks of one process.

    Attributes:
      maps: number of memory maps, counted after each module.
      kilobytes: memory in kilobytes.
      rise, module: the largest increase of the peak by one module's tests, in kilobytes, and the module.
    """

    maps: int = 0
    kilobytes: int = 0
    rise: int = 0
    module: str = ""


_own = Peaks()
_by_worker: dict[str, Peaks] = {}


def note(module: str) -> None:
    """Updates this process's peaks after the tests of a module."""
    global _own
    maps = _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rise, name = max((_own.rise, _own.module), (kilobytes - _own.kilobytes, module))
    _own = Peaks(max(_own.maps, maps), kilobytes, rise, name)


def peaks() -> tuple[int, int, int, str]:
    """Returns this process's peaks as plain values."""
    return _own.maps, _own.kilobytes, _own.rise, _own.module


def add(worker: str, worker_peaks: tuple[int, int, int, str] | None) -> None:
    """Adds the peaks of another process."""
    if worker_peaks is not None:
        _by_worker[worker] = Peaks(*worker_peaks)


def summary() -> list[str]:
    """Formats a line per process that ran tests."""
    limit = int(_LIMIT.read_text()) if _LIMIT.exists() else 0
    rows = _by_worker or ({"main": _own} if _own.maps else {})
    return [
        f"{worker}: peaks of {peak.maps:,} memory maps (limit {limit:,}) and {peak.kilobytes / 1e6:.1f} GB, "
        f"{peak.rise / 1e6:.1f} GB of it by {peak.module}"
        for worker, peak in sorted(rows.items())
    ]
