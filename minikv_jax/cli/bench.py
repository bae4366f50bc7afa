"""`minikv bench`: measure speed and memory on this machine."""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cuda_ffi
from minikv_jax import files, meshes
from minikv_jax.bench import generate, huggingface, kernels, trace
from minikv_jax.bench.end_to_end import Case
from minikv_jax.bench.fit import FIELDS
from minikv_jax.bench.timing import Row
from minikv_jax.cli import bench_devices, output, shared
from minikv_jax.models.partition import device_part
from minikv_jax.ops import dispatch

_METHODS = ("minikv", "full")
_BATCH, _PROMPT_LEN, _MAX_NEW_TOKENS, _TRACED_STEPS = 1, 2048, 1024, 16


class Suite(NamedTuple):
    """A subcommand of `minikv bench`."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per suite."""
    subparsers = parser.add_subparsers(required=True, metavar="SUITE", dest="suite")
    for name, suite in _SUITES.items():
        subparser = subparsers.add_parser(name, help=suite.summary)
        suite.add_arguments(subparser)
        shared.add_verbose(subparser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite."""
    return _SUITES[arguments.suite].run(arguments)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=shared.output_file, metavar="FILE", help="JSON file to write")


def _write_rows(
    arguments: argparse.Namespace, report: dict[str, Any], rows: Iterable[Row], line: Callable[[Row], str]
) -> int:
    """Prints a line per row; the file of --output is complete after each. Returns 1 if all rows are errors."""
    for row in rows:
        report["results"].append(row)
        print(line(row), flush=True)
        output.write_json(arguments.output, report, indent=1)
    return int(all("error" in row for row in report["results"]))


# kernels --------------------------------------------------------------------------------------------------------------


def _run_kernels(arguments: argparse.Namespace) -> int:
    """Measures the kernels, and prints and writes their rows."""
    if reason := cuda_ffi.why_unavailable():
        raise ValueError(reason)
    report = kernels.new_report("minikv bench kernels")
    return _write_rows(arguments, report, kernels.measure(report), kernels.line)


# generate -------------------------------------------------------------------------------------------------------------


def _add_cases(parser: argparse.ArgumentParser, methods: str = "see `minikv methods`") -> None:
    """Adds the options of `_cases` that every suite of whole models has."""
    source = parser.add_mutually_exclusive_group(required=True)
    named = "llama2-7b, llama-3.1-8b, llama-3.1-70b"
    source.add_argument("--shape", help=f"random weights: {named}, a config.json or its directory")
    shared.add_model(source, required=False)
    shared.add_method(parser, action="append", help=f"{methods}; repeatable; default: minikv and full")
    shared.add_plugin(parser)
    for flag, default, text in (
        ("--batch", _BATCH, "rows"),
        ("--prompt-len", _PROMPT_LEN, "prompt tokens"),
        ("--max-new-tokens", _MAX_NEW_TOKENS, "generated tokens"),
    ):
        parser.add_argument(
            flag, action="append", type=shared.positive, metavar="N", help=f"{text}; repeatable; default: {default}"
        )
    shared.add_dtype(parser, "bfloat16")
    shared.add_implementation(parser)
    _add_output(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser, f"see `minikv methods`, or {', '.join(huggingface.METHODS)}")
    parser.add_argument(
        "--steps", type=shared.positive, metavar="N", help="time N decode steps in the middle and N at the end"
    )
    parser.add_argument(
        "--memory-gb", type=shared.number, metavar="G", help="limit each run to G * 10^9 bytes of the device"
    )
    parser.add_argument("--find", choices=FIELDS, help="the largest batch or longest prompt that --memory-gb holds")
    parser.add_argument(
        "--mesh",
        action="append",
        type=shared.argument(_mesh),
        metavar="AXIS=N[,AXIS=N]",
        help="devices, such as data=2,model=4, or none for one device; repeatable; default: none",
    )
    parser.add_argument(
        "--compile-ahead",
        type=shared.positive,
        metavar="N",
        help="compile all runs first, N at a time: `compile_s` is then the time to fetch them from the cache",
    )
    parser.set_defaults(layers=None)


def _run_generate(arguments: argparse.Namespace) -> int:
    """Measures the cases, and prints and writes their rows."""
    if arguments.find and arguments.memory_gb is None:
        raise ValueError(f"--find {arguments.find}: expected --memory-gb, the limit to find it for")
    if arguments.memory_gb is not None and not 1 <= arguments.memory_gb * 1e9 < math.inf:
        raise ValueError(f"--memory-gb {arguments.memory_gb:g}: expected a number of at least one byte")
    dispatch.check_implementation(arguments.implementation)
    cases = list(_cases(arguments))
    ours = [case for case in cases if case.method not in huggingface.METHODS]
    _check_meshes(cases, arguments.find)
    if arguments.find and len(ours) < len(cases):
        raise ValueError(f"--find {arguments.find}: not with Hugging Face's methods, whose needs are not known ahead")
    for case in cases:  # reports errors before anything runs
        case.config()
    for case in ours:
        case.check()
    bench = generate.Bench(arguments.command_line, arguments.memory_gb)
    if arguments.compile_ahead and not arguments.find:
        bench.compile_ahead(ours, arguments.compile_ahead)
    rows = (bench.fitted(case, arguments.find) if arguments.find else bench.row(case) for case in cases)
    return _write_rows(arguments, bench.report, rows, generate.line)


def _check_meshes(cases: list[Case], find: str | None) -> None:
    """Raises ValueError for a case that cannot be split over its mesh, or that would run on one device all the same."""
    for case in cases:
        if case.mesh is None:
            continue
        if find or case.method in huggingface.METHODS:
            what = f"--find {find}" if find else case.method
            raise ValueError(f"--mesh {case.mesh}: not with {what}, which measures one device")
        meshes.check_multiple("rows", case.batch, meshes.DATA, case.shards(meshes.DATA))
        device_part(case.config(), case.shards(meshes.MODEL))


def _mesh(text: str) -> str | None:
    """Checks a mesh given as text, and returns it; None for "none"."""
    if text != "none":
        meshes.parse(text)
        return text
    return None


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yields every combination of methods and sizes; the size to be found is 1."""
    prompts = [1] if arguments.find == "prompt" else arguments.prompt_len or [_PROMPT_LEN]
    batches = [1] if arguments.find == "batch" else arguments.batch or [_BATCH]
    news = arguments.max_new_tokens or [_MAX_NEW_TOKENS]
    sizes = itertools.product(arguments.method or _METHODS, news, prompts, batches, arguments.mesh or [None])
    for method, new, prompt_len, batch, mesh in sizes:
        yield Case(
            shape=arguments.shape,
            model=arguments.model,
            method=method,
            batch=batch,
            prompt_len=prompt_len,
            max_new_tokens=new,
            steps=arguments.steps,
            dtype=arguments.dtype,
            implementation=arguments.implementation,
            plugins=tuple(map(str, arguments.plugin)),
            mesh=mesh,
            layers=arguments.layers,
        )


# trace ----------------------------------------------------------------------------------------------------------------


def _add_trace(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    parser.add_argument(
        "--steps",
        type=shared.positive,
        default=_TRACED_STEPS,
        metavar="N",
        help=f"decode steps to trace; default: {_TRACED_STEPS}",
    )
    parser.add_argument("--prefill", action="store_true", help="trace the prefill instead of decode steps")
    parser.add_argument(
        "--layers", type=shared.positive, metavar="N", help="with --shape: the model's first N layers only"
    )
    parser.set_defaults(mesh=None, find=None)


def _run_trace(arguments: argparse.Namespace) -> int:
    """Traces the cases, and prints and writes their tables."""
    dispatch.check_implementation(arguments.implementation)
    cases = list(_cases(arguments))
    for case in cases:  # reports errors before anything runs
        case.check()
        if arguments.steps > case.max_new_tokens:
            raise ValueError(f"--steps {arguments.steps}: expected at most {case.max_new_tokens}, the new tokens")
    bench = generate.Bench(arguments.command_line, None)
    return _write_rows(arguments, bench.report, (bench.traced(case, arguments.prefill) for case in cases), trace.table)


# figures --------------------------------------------------------------------------------------------------------------


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=pathlib.Path, metavar="RESULT.json", help="of one device")
    shared.add_directory(parser)


def _run_figures(arguments: argparse.Namespace) -> int:
    """Prints the results as Markdown, and draws what has at least two sizes."""
    shared.need_matplotlib()
    from minikv_jax.bench import figures  # matplotlib is optional

    reports = [figures.read_report(file) for file in arguments.results]
    devices = sorted({report["device"] for report in reports})
    if len(devices) > 1:
        raise ValueError(f"results of {', '.join(devices)}: expected one device")
    rows = [row for report in reports for row in report["results"]]
    print(figures.table(rows))
    pictures = figures.draw([row for row in rows if "error" not in row], devices[0])
    for name, content in pictures.items():
        files.write_bytes(arguments.out / name, content)
        print(arguments.out / name)
    if not pictures:
        print("minikv: no picture: one takes two prompt lengths, or two batches, of a model", file=sys.stderr)
    return 0


_SUITES = {
    "kernels": Suite("the attention and quantisation kernels", _add_output, _run_kernels),
    "generate": Suite(
        "prefill, decode and memory of whole models, beside the hardware's floor", _add_generate, _run_generate
    ),
    "trace": Suite("a decode step or a prefill by model part and kernel", _add_trace, _run_trace),
    "devices": Suite(
        "one device of this machine, all, and those between, within a limit of time",
        bench_devices.add_arguments,
        bench_devices.run,
    ),
    "figures": Suite("pictures of the results of `generate`", _add_figures, _run_figures),
}
