"""Kernel benchmark: op x shape x implementation, with cuDNN and the device's own rates, in one process.

`minikv bench kernels --output results.json`. Warm medians on random data. What it records under
`minikv_jax/bench/results/` also decides which implementation runs by default (`kernels.order`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import jax

import cuda_ffi
from minikv_jax.bench import timing
from minikv_jax.bench.decode import SHAPES as DECODE_SHAPES
from minikv_jax.bench.decode import bench_decode
from minikv_jax.bench.prefill import SHAPES as PREFILL_SHAPES
from minikv_jax.bench.prefill import bench_prefill
from minikv_jax.bench.quantize import bench_quantize
from minikv_jax.cli.shared import Parser, output_file


def benchmarks(rate: dict[str, float]) -> Iterator[timing.Benchmark]:
    """Everything that is measured."""
    for shape in DECODE_SHAPES:
        yield bench_decode(shape, rate)
    for implementation in ("cuda", "pallas"):
        for axis in ("tokens", "channels"):
            yield bench_quantize(axis, implementation, rate)
    for shape in PREFILL_SHAPES:
        yield bench_prefill(shape)


def main(arguments: list[str] | None = None) -> None:
    """Runs everything, prints a table and writes one JSON file."""
    parser = Parser(prog="minikv bench kernels", description="Times the kernels on this machine's GPU.")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    options = parser.parse_args(arguments)
    reason = cuda_ffi.why_unavailable()
    if reason:
        parser.error(reason)
    device = jax.devices("gpu")[0]
    report: dict[str, Any] = {
        "device": device.device_kind,
        "compute_capability": device.compute_capability,
        "jax": jax.__version__,
        "backend": device.client.platform_version.splitlines()[0],
        "command": "minikv bench kernels",
        **timing.rates(),
        "results": [],
    }
    for row in timing.run(benchmarks(report)):
        report["results"].append(row)
        sys.stdout.write(_line(row) + "\n")
        sys.stdout.flush()
        if options.output:
            with open(options.output, "w") as file:
                json.dump(report, file, indent=1)
                file.write("\n")


def _line(row: dict[str, Any]) -> str:
    text = f"{row['op']:18}{row['shape']:50}{row['implementation']:8}{row['ms']:9.4f} ms"
    if "bytes_per_s" in row:
        text += f" {row['bytes_per_s'] / 1e9:6.0f} GB/s {row['fraction_of_floor']:6.1%} of the floor"
    if "column_sums_ms" in row:
        text += f" (rows {row['row_log_sum_exp_ms']:.4f}, columns {row['column_sums_ms']:.4f})"
    if "times_cudnn" in row:
        text += f"  {row['times_cudnn']:.2f} x cuDNN's time"
    if "times_faster_than_cudnn" in row:
        text += f"  {row['times_faster_than_cudnn']:.2f} x as fast as cuDNN"
    return text


if __name__ == "__main__":
    main()
