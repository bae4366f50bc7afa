"""Memory maps and memory of the test processes: a process that compiles thousands of programs may run out of either."""

from __future__ import annotations

import pathlib
import resource

_MAPS, _LIMIT = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")
_peak_maps = 0
_by_worker: dict[str, tuple[int, int]] = {}


def note() -> None:
    """Counts this process's memory maps; called when a module's tests are done."""
    global _peak_maps
    if _MAPS.exists():
        _peak_maps = max(_peak_maps, _MAPS.read_bytes().count(b"\n"))


def peaks() -> tuple[int, int]:
    """Most memory maps that were counted, and peak memory in kilobytes."""
    return _peak_maps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def add(worker: str, worker_peaks: tuple[int, int] | None) -> None:
    """Keeps the peaks of another process."""
    if worker_peaks is not None:
        _by_worker[worker] = worker_peaks


def summary() -> list[str]:
    """A line per process that ran tests."""
    limit = int(_LIMIT.read_text()) if _LIMIT.exists() else 0
    rows = _by_worker or ({"main": peaks()} if _peak_maps else {})
    return [
        f"{worker}: at most {maps:,} of {limit:,} memory maps after a module, {kilobytes / 1e6:.1f} GB of memory"
        for worker, (maps, kilobytes) in sorted(rows.items())
    ]
