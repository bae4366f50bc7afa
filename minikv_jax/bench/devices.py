"""Speed of one machine's devices together, within a limit of time.

A step is a command, or all sizes of one shape on one mesh, which one process measures. Steps on one device come first,
then those on all devices. No step gets more than twice its part of the time that is left, and what a step does not
finish is a row with an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from minikv_jax import files
from minikv_jax.bench import end_to_end, trace
from minikv_jax.bench.end_to_end import Case
from minikv_jax.bench.generate import Bench, line
from minikv_jax.bench.worker import FAILURES, reason
from minikv_jax.meshes import AXES, DATA, MODEL
from minikv_jax.models.partition import device_part

Row = dict[str, Any]
_TRACED_STEPS = 16
_OTHER_WEIGHT = 8  # of a step that measures nothing, in rows


class Sizes(NamedTuple):
    """What is measured on each mesh.

    Attributes:
      shapes: measured on all meshes.
      split_shapes: measured on the largest mesh of "model" alone.
      batches: rows, on each part of "data".
      long_prompts: lengths of prompts that are measured at batch 1 where "data" is 1.
    """

    shapes: Sequence[str]
    split_shapes: Sequence[str]
    batches: Sequence[int]
    long_prompts: Sequence[int]


def plan(sizes: Sizes, like: Case, devices: int) -> list[list[Case]]:
    """Lists the cases of each step: one device, then all of them, then the powers of two in between.

    Args:
      like: the case that the others are made from, by changes of shape, mesh, batch and prompt length.
      devices: number of devices.
    """
    counts = [1 << power for power in range(1, devices.bit_length()) if 1 << power < devices]
    steps = [_cases(sizes, like, shape, None) for shape in sizes.shapes]
    for count in [devices, *reversed(counts)] if devices > 1 else []:
        steps += [_cases(sizes, like, shape, f"{axis}={count}") for axis in (MODEL, DATA) for shape in sizes.shapes]
        if count == devices:
            steps += [_cases(sizes, like, shape, f"{MODEL}={count}") for shape in sizes.split_shapes]
    return steps


def _cases(sizes: Sizes, like: Case, shape: str, mesh: str | None) -> list[Case]:
    case = dataclasses.replace(like, shape=shape, mesh=mesh)
    parts = case.shards(DATA)
    cases = [dataclasses.replace(case, batch=batch * parts) for batch in sizes.batches]
    if parts == 1:
        cases += [dataclasses.replace(case, batch=1, prompt_len=length) for length in sizes.long_prompts]
    return cases


# Steps ----------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A step: its name, its weight in sharing the time, and what it does in at most so many seconds."""

    name: str
    weight: int
    run: Callable[[float], str]


def run(steps: Sequence[Step], end: float) -> Iterator[Row]:
    """Runs the steps until the clock (`time.monotonic`) says `end`; yields share, seconds and outcome of each."""
    for number, step in enumerate(steps):
        began = time.monotonic()
        left = max(end - began, 0.0)
        share = min(left, 2 * left * step.weight / sum(other.weight for other in steps[number:]))
        outcome = step.run(share)
        seconds = time.monotonic() - began
        yield {"step": step.name, "limit_s": round(share, 1), "seconds": round(seconds, 1), "outcome": outcome}


def run_command(command: str, limit: float) -> str:
    """Runs a command with its output on the terminal, and returns how it ended. Stops what it leaves running."""
    process = subprocess.Popen(shlex.split(command), start_new_session=True)
    try:
        return f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure_cases(cases: Sequence[dict[str, Any]], log: str) -> None:
    """Measures cases of one model, and appends a row of each, or its error, to the file `log`."""
    own = [Case(**case) for case in cases]
    params = nnx.state(own[0].load())
    with files.appending(pathlib.Path(log)) as append:
        for case in own:
            try:
                append(end_to_end.measure(case, params) | {"peak_bytes": None})  # the process's, not the case's
            except Exception as error:  # a size that does not fit says nothing of the next
                append({"error": reason(error)})


class Devices:
    """Measures all steps and keeps the report: that of `bench generate`, with the steps, and traces of split models.

    Args:
      command: recorded in the report.
      sizes: what is measured.
      like: the other settings of all cases.
      limit: seconds from now.

    Raises:
      ValueError: a shape cannot be split over one of the meshes.
    """

    def __init__(self, command: str, sizes: Sizes, like: Case, limit: float):
        self.end = time.monotonic() + limit
        self.bench = Bench(command, None)
        self.report = self.bench.report
        self.report |= {"limit_s": limit, "steps": [], "traces": []}
        self.plan = plan(sizes, like, self.report["devices"])
        for cases in self.plan:
            device_part(cases[0].config(), cases[0].shards(MODEL))

    def run(self, commands: Sequence[str], jobs: int) -> Iterator[Row]:
        """Runs the commands, compiles all programs, `jobs` at a time, and measures; yields what each step came to."""
        steps = [Step(command, _OTHER_WEIGHT, functools.partial(run_command, command)) for command in commands]
        steps += [Step("compile", _OTHER_WEIGHT, functools.partial(self._compile, jobs))]
        for cases in self.plan:
            name = f"{cases[0].shape} on {cases[0].mesh or 'one device'}"
            steps += [Step(name, len(cases), functools.partial(self._measure, cases))]
        for cases in self.plan:
            if cases[0].shards(MODEL) == self.report["devices"] > 1:
                decoding = [case for case in cases if case.prompt_len == cases[0].prompt_len]
                case = dataclasses.replace(decoding[len(decoding) // 2], steps=_TRACED_STEPS)
                name = f"trace of {case.shape} on {case.mesh}, batch {case.batch}"
                steps += [Step(name, 2, functools.partial(self._trace, case))]
        for step in run(steps, self.end):
            self.report["steps"].append(step)
            yield step

    def _compile(self, jobs: int, limit: float) -> str:
        self.bench.compile_ahead([case for cases in self.plan for case in cases], jobs, limit)
        return "done"

    def _trace(self, case: Case, limit: float) -> str:
        row = self.bench.traced(case, False, limit)
        self.report["traces"].append(row)
        print(trace.table(row), flush=True)
        return row.get("error", "done")

    def _measure(self, cases: Sequence[Case], limit: float) -> str:
        """Measures the cases in a process of their own; reports a row of each, whatever happens."""
        with tempfile.TemporaryDirectory() as directory:
            log, error = pathlib.Path(directory) / "rows.jsonl", "no row"
            log.touch()
            try:
                fields = [dataclasses.asdict(case) for case in cases]
                self.bench.run_task(measure_cases, fields, str(log), seconds=limit)
            except FAILURES as failure:
                error = str(failure)
            found = [row for _, row in files.read_log(log)[0]]
        for number, case in enumerate(cases):
            row = self.bench.complete(case, found[number] if number < len(found) else {"error": error})
            self.report["results"].append(compared(row, case, self.report["results"]))
            print(line(self.report["results"][-1]), flush=True)
        return f"{sum('error' not in row for row in found)} of {len(cases)} rows"


def compared(row: Row, case: Case, rows: Sequence[Row]) -> Row:
    """Adds what a mesh gains over one device with as many rows as each of its parts, if `rows` has that.

    `step_ratio` and `prefill_ratio` are times over those of one device, `efficiency` is tokens per second over those of
    one device and the number of devices.
    """
    if "error" in row or case.mesh is None:
        return row
    one = dataclasses.asdict(dataclasses.replace(case, mesh=None, batch=case.batch // case.shards(DATA)))
    for other in rows:
        if "error" not in other and all(other.get(name) == value for name, value in one.items()):
            gained = row["decode_tokens_per_s"] / other["decode_tokens_per_s"]
            return row | {
                "step_ratio": row["decode_ms"] / other["decode_ms"],
                "prefill_ratio": row["prefill_s"] / other["prefill_s"],
                "efficiency": gained / case.shards(*AXES),
            }
    return row
