"""End-to-end benchmark: `minikv bench generate`, every run in a process of its own.

    minikv bench generate --shape llama2-7b --batch 1 --batch 16 --prompt-len 2048 --output out.json
    minikv bench generate --shape llama2-7b --find batch --memory-gb 40 --prompt-len 2048

A run's floor is the time that the device takes to read the weights and the valid part of the cache at the rate it reads
memory at (`timing.rates`): no decode step can be faster.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from minikv_jax.bench import huggingface, timing
from minikv_jax.bench.end_to_end import Case, Programs, measure
from minikv_jax.bench.fit import FIELDS, find
from minikv_jax.bench.worker import TaskError, run_task
from minikv_jax.cli.shared import Parser, output_file
from minikv_jax.models import hub
from minikv_jax.models.decoder import DTYPES
from minikv_jax.ops.dispatch import IMPLEMENTATIONS

_PACKAGES = ("jax", "jaxlib", "flax")
_PROBE_SHARE = 0.5  # of the device's memory that the process which looks at the device may use
METHODS = f"see `minikv methods`, or {', '.join(huggingface.METHODS)}; repeatable; default: minikv and full"
_REGION = 1 << 21  # the allocator rounds what it takes up to a multiple of so many bytes
_SMALLER = 0.98  # what a size that was found is multiplied by when it runs out of memory after all


def _share(limit: int, total: int) -> float:
    """Of a device's memory, in millionths: so much that the allocator does not round it up beyond `limit` bytes."""
    return math.floor(1e6 * (limit // _REGION * _REGION) / total) / 1e6


def device() -> dict[str, Any]:
    """What runs: device, backend, its memory in bytes, and the rates it reads and copies at. For a process of its own.

    Memory and rates are None where there is no GPU or no CUDA library.
    """
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    try:
        rates = timing.rates()
    except NotImplementedError as error:
        rates = {"read_bytes_per_s": None, "copy_bytes_per_s": None, "no_rates": str(error)}
    return {
        "device": first.device_kind,
        "backend": first.client.platform_version.splitlines()[0],
        "memory_bytes": None if limit is None else round(limit / _PROBE_SHARE),
        **rates,
    }


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """`measure`, from JSON values; of a Hugging Face method, its counterpart in torch."""
    return (huggingface.measure if case["method"] in huggingface.METHODS else measure)(Case(**case))


def compiled(case: dict[str, Any]) -> dict[str, float]:
    """Compiles a case's programs into the compilation cache. Returns the seconds that each took."""
    return Programs(Case(**case)).compile_s


def found(case: dict[str, Any], what: str, limit: int) -> dict[str, Any]:
    """`find`, from JSON values."""
    return find(Case(**case), what, limit)


class Bench:
    """Runs cases one after the other and keeps the report."""

    def __init__(self, command: str, memory_gb: float | None):
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR")
            or str(hub.cache_directory() / "compiled"),
        }
        about = self._run("device", share=_PROBE_SHARE)
        self.limit = None if memory_gb is None else round(memory_gb * 1e9)
        total = about["memory_bytes"]
        if self.limit is not None and total is not None and self.limit > total:
            raise ValueError(f"--memory-gb {memory_gb:g}: this device has {total / 1e9:.1f} GB")
        self.share = _share(self.limit, total) if self.limit and total else 0.97
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self.report: dict[str, Any] = {"command": command, **about, "versions": versions, "results": []}

    def _run(self, function: str, *arguments: Any, share: float) -> Any:
        environment = self.environment | {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.6f}",
            # One region for all that a run allocates: a batch that fills the device does not fail by fragments.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if function == "measured" else "false",
        }
        return run_task(__name__, function, *arguments, environment=environment)

    def compile_ahead(self, cases: Sequence[Case], jobs: int) -> None:
        """Compiles all cases, `jobs` at a time; what does not compile will say so when it is run."""

        def compile_one(case: Case) -> None:
            with contextlib.suppress(TaskError, NotImplementedError):
                self._run("compiled", dataclasses.asdict(case), share=self.share)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, cases))

    def row(self, case: Case) -> dict[str, Any]:
        """A case's sizes and what was measured, or why nothing was."""
        sizes = {name: value for name, value in dataclasses.asdict(case).items() if value is not None}
        row = sizes | {"memory_limit_bytes": self.limit}
        try:
            row |= self._run("measured", dataclasses.asdict(case), share=self.share)
        except (TaskError, NotImplementedError) as error:
            return row | {"error": str(error)}
        for stretch in row["decode"].values():
            stretch |= self._floor(row["weight_bytes"] + stretch["cache_bytes_read"], stretch["ms_per_step"])
        return row | {"times_floor": next(iter(row["decode"].values()))["times_floor"]}

    def _floor(self, bytes_read: int, ms: float) -> dict[str, float | None]:
        """The floor of a decode step, and how many times as long the step took."""
        rate = self.report["read_bytes_per_s"]
        if rate is None:
            return {"floor_ms": None, "times_floor": None}
        floor = 1e3 * bytes_read / rate
        return {"floor_ms": floor, "times_floor": ms / floor}

    def fitted(self, case: Case, what: str) -> dict[str, Any]:
        """The row of the largest batch or the longest prompt within the limit, confirmed by running it."""
        found = self._run("found", dataclasses.asdict(case), what, self.limit, share=self.share)
        size, failed = found["size"], []
        while True:
            row = self.row(dataclasses.replace(case, **{FIELDS[what]: size})) | {
                "found": found | {"out_of_memory": failed}
            }
            if "out of memory" not in row.get("error", "") or size == 1:
                return row
            failed.append(size)
            size = min(size - 1, int(size * _SMALLER))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything, prints a table and writes one JSON file; 1 where nothing ran to its end."""
    options = _parser().parse_args(arguments)
    if options.find and options.memory_gb is None:
        raise ValueError(f"--find {options.find}: expected --memory-gb, the limit to find it for")
    if options.memory_gb is not None and not 1 <= options.memory_gb * 1e9 < math.inf:
        raise ValueError(f"--memory-gb {options.memory_gb:g}: expected a number of at least one byte")
    cases = list(_cases(options))
    for case in cases:  # what can be wrong is found before anything runs
        case.config()
        if case.method not in huggingface.METHODS:
            case.preset()
        elif options.find:
            raise ValueError(f"--find {options.find}: not with {case.method}, whose needs are not known ahead")
    given = sys.argv[1:] if arguments is None else ["bench", "generate", *arguments]
    bench = Bench(shlex.join(["minikv", *given]), options.memory_gb)
    if options.compile_ahead and not options.find:
        bench.compile_ahead([case for case in cases if case.method not in huggingface.METHODS], options.compile_ahead)
    for case in cases:
        row = bench.fitted(case, options.find) if options.find else bench.row(case)
        bench.report["results"].append(row)
        print(line(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(bench.report, indent=1) + "\n")
    return int(all("error" in row for row in bench.report["results"]))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minikv bench generate", description="Times prefill and decode of whole models, and their memory."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", help="random weights: llama2-7b, llama-3.1-8b, a config.json or its directory")
    source.add_argument("--model", help="real weights: a directory, a .gguf file, a hub id, or smollm2-135m-instruct")
    parser.add_argument("--method", action="append", metavar="NAME[:KEY=VALUE,...]", help=METHODS)
    parser.add_argument("--plugin", action="append", metavar="FILE", default=[], help="a Python file with methods")
    parser.add_argument("--batch", action="append", type=_positive, metavar="N", help="rows; repeatable; default: 1")
    parser.add_argument("--prompt-len", action="append", type=_positive, metavar="N", help="repeatable; default: 2048")
    parser.add_argument(
        "--max-new-tokens", action="append", type=_positive, metavar="N", help="repeatable; default: 1024"
    )
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="time N decode steps amid and at the end of the new ones"
    )
    parser.add_argument("--memory-gb", type=float, metavar="G", help="limit each run to G * 10^9 bytes of the device")
    parser.add_argument("--find", choices=FIELDS, help="the largest batch or longest prompt that --memory-gb holds")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: the fastest measured")
    parser.add_argument(
        "--compile-ahead",
        type=_positive,
        metavar="N",
        help="compile all runs first, N at a time: `compile_s` is then the time to fetch them from the cache",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON file to write")
    return parser


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    prompts = [1] if options.find == "prompt" else options.prompt_len or [2048]
    batches = [1] if options.find == "batch" else options.batch or [1]
    for method, new, prompt, batch in itertools.product(
        options.method or ["minikv", "full"], options.max_new_tokens or [1024], prompts, batches
    ):
        yield Case(
            shape=options.shape,
            model=options.model,
            method=method,
            batch=batch,
            prompt_len=prompt,
            max_new_tokens=new,
            steps=options.steps,
            dtype=options.dtype,
            implementation=options.implementation,
            plugins=tuple(options.plugin),
        )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least 1")
    return int(text)


def line(row: dict[str, Any]) -> str:
    """A row in one line of text."""
    text = f"{row['method']:12} batch {row['batch']:4} prompt {row['prompt_len']:7,} + {row['max_new_tokens']:5,}: "
    if "error" in row:
        return text + row["error"]
    floor = "" if row["times_floor"] is None else f" ({row['times_floor']:.2f} x floor)"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e9:.2f} GB"
    return (
        f"{text}prefill {row['prefill_s']:.3f} s, decode {row['decode_ms']:.2f} ms a step{floor}, "
        f"{row['decode_tokens_per_s']:,.0f} tokens/s{peak}, cache {row['cache_bytes'] / 1e9:.3f} GB, "
        f"compile {sum(row['compile_s'].values()):.0f} s"
    )
