"""Kernel benchmark: every op, shape and implementation against cuDNN and the device's memory rates, in one process.

Times are warm medians on random data. The results recorded in `minikv_jax/bench/results/` also decide which
implementation runs by default (`dispatch.order`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from minikv_jax.bench import timing
from minikv_jax.bench.decode import SHAPES as DECODE_SHAPES
from minikv_jax.bench.decode import bench_decode
from minikv_jax.bench.prefill import SHAPES as PREFILL_SHAPES
from minikv_jax.bench.prefill import bench_prefill
from minikv_jax.bench.quantize import bench_quantize
from minikv_jax.bench.votes import CASES as VOTES_CASES
from minikv_jax.bench.votes import bench_votes


def new_report(command: str) -> dict[str, Any]:
    """The report of a run on this machine's GPU, without results: device, versions and rates."""
    device = jax.devices("gpu")[0]
    return {
        "device": device.device_kind,
        "compute_capability": device.compute_capability,
        "jax": jax.__version__,
        "backend": device.client.platform_version.splitlines()[0],
        "command": command,
        **timing.rates(),
        "results": [],
    }


def measure(rates: dict[str, float]) -> Iterator[timing.Row]:
    """Measures everything, and yields a row per op, shape and implementation.

    Args:
      rates: of `timing.rates`, as a report holds them.
    """
    return timing.run(_benchmarks(rates))


def _benchmarks(rates: dict[str, float]) -> Iterator[timing.Benchmark]:
    for shape in DECODE_SHAPES:
        yield bench_decode(shape, rates)
    for implementation in ("cuda", "pallas"):
        for axis in ("tokens", "channels"):
            yield bench_quantize(axis, implementation, rates)
    for shape in PREFILL_SHAPES:
        yield bench_prefill(shape)
    for shape, windows in VOTES_CASES:
        yield bench_votes(shape, windows)


def line(row: timing.Row) -> str:
    """A row as one line of text."""
    text = f"{row['op']:18}{row['shape']:50}{row['implementation']:8}{row['ms']:9.4f} ms"
    if "bytes_per_s" in row:
        text += f" {row['bytes_per_s'] / 1e9:6.0f} GB/s {row['fraction_of_floor']:6.1%} of the floor"
    if "column_sums_ms" in row:
        text += f" (rows {row['row_log_sum_exp_ms']:.4f}, columns {row['column_sums_ms']:.4f})"
    if "times_cudnn" in row:
        text += f"  {row['times_cudnn']:.2f}x cuDNN's time"
    if "times_faster_than_cudnn" in row:
        text += f"  {row['times_faster_than_cudnn']:.2f}x as fast as cuDNN"
    return text
