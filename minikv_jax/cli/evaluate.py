"""`minikv evaluate`: arguments, tables, JSON. Importing this imports no JAX beyond what the package itself does."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import typing
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from minikv_jax.checks import at_least
from minikv_jax.cli.shared import key_value, output_directory, output_file
from minikv_jax.evaluation.tables import means_table
from minikv_jax.evaluation.task import Task
from minikv_jax.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerBase

    from minikv_jax.evaluation.fit import SizedMethod
    from minikv_jax.evaluation.run import Evaluator
    from minikv_jax.models.decoder import Llama


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Fills in `minikv evaluate`: a subcommand per task, an argument per option of the task."""
    tasks = parser.add_subparsers(required=True, metavar="TASK", dest="task")
    for name, task in TASKS.items():
        subparser = tasks.add_parser(name, help=task.summary, description=task.__doc__)
        subparser.set_defaults(run=_evaluate)
        add_model(subparser)
        add_methods(subparser)
        add_task(subparser, task)
        subparser.add_argument("--json", type=output_file, metavar="OUT", help="also write every case's numbers")


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Fills in `minikv sweep`: tasks as in `minikv evaluate`, and a grid of fields."""
    tasks = parser.add_subparsers(required=True, metavar="TASK", dest="task")
    for name, task in TASKS.items():
        subparser = tasks.add_parser(name, help=task.summary, description=task.__doc__)
        subparser.set_defaults(run=_sweep)
        add_model(subparser)
        add_methods(subparser)
        add_task(subparser, task)
        subparser.add_argument(
            "--sweep",
            type=_axis,
            action="append",
            default=[],
            metavar="KEY=VALUE,VALUE,...",
            help="values of a field; several fields make a grid",
        )
        subparser.add_argument(
            "--out", type=output_directory, required=True, metavar="DIR", help="where rows, tables and figures go"
        )
        subparser.add_argument("--no-figures", action="store_true", help="no pareto.png and report.html")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments that say what runs where."""
    parser.add_argument("--model", required=True, help="a directory, a .gguf file, a hub id, or smollm2-135m-instruct")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--implementation", metavar="NAME", help="xla, pallas or cuda; default: the best there is")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Arguments that change the methods given, or add schemes."""
    parser.add_argument(
        "--set", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="change a field of every method"
    )
    parser.add_argument(
        "--plugin", type=pathlib.Path, action="append", default=[], metavar="FILE", help="a Python file with schemes"
    )


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which methods run."""
    parser.add_argument(
        "--method", action="append", required=True, metavar="NAME[:KEY=VALUE,...]", help="may be given several times"
    )
    add_changes(parser)
    parser.add_argument(
        "--budget-bytes",
        type=_shares,
        default=(),
        metavar="SHARE[,SHARE...]",
        help="fit every method's token budget to these shares of the full cache's bytes",
    )


def add_task(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """An argument per option of the task, and how many of its cases run at a time."""
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="cases at a time; default: %(default)s")
    for field in dataclasses.fields(typing.cast(Any, task)):
        parse, text = field.metadata["parse"], field.metadata["help"]
        flag = f"--{field.name.replace('_', '-')}"
        if parse is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(flag, type=parse, required=True, metavar="...", help=text)
        else:
            shown = "" if field.default is None else f"; default: {_shown(field.default)}"
            parser.add_argument(flag, type=parse, default=field.default, metavar="...", help=text + shown)


def make_task(arguments: argparse.Namespace) -> Task:
    """The task with its options as given; a data set on the hub becomes a local directory."""
    from minikv_jax.evaluation import data

    task = TASKS[arguments.task]
    options = {}
    for field in dataclasses.fields(typing.cast(Any, task)):
        value = getattr(arguments, field.name)
        options[field.name] = data.locate(value, field.metadata["hub"]) if field.metadata["hub"] else value
    return task(**options)


def make_methods(arguments: argparse.Namespace) -> dict[str, SizedMethod]:
    """The methods by label: as they were given, with the share of bytes behind where there is one."""
    from minikv_jax.evaluation.fit import SizedMethod
    from minikv_jax.methods import lookup as presets
    from minikv_jax.methods.base import load_plugin

    for file in arguments.plugin:
        load_plugin(file)
    methods: dict[str, SizedMethod] = {}
    for text in arguments.method:
        config = presets.parse(text, arguments.set)
        for share in arguments.budget_bytes or (None,):
            label = text if share is None else f"{text} @ {share:.4g}"
            if label in methods:
                raise ValueError(f"method {label!r} is given twice")
            methods[label] = SizedMethod(config, share)
    return methods


def make_evaluator(arguments: argparse.Namespace) -> Evaluator:
    """The task's cases and the loaded model; the task's options are looked at first."""
    from minikv_jax.evaluation.run import Evaluator

    task = make_task(arguments)
    return Evaluator.create(*load_model(arguments), task, arguments.implementation)


def load_model(arguments: argparse.Namespace) -> tuple[Llama, PreTrainedTokenizerBase | None]:
    """The model and tokenizer of `add_model`'s arguments."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import jax

    from minikv_jax.models import hub
    from minikv_jax.ops import dispatch as kernels

    kernels.check_implementation(arguments.implementation)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_directory() / "compiled"))
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return hub.load(arguments.model, dtype=dtype)


def progress(description: str, total: int) -> AbstractContextManager[_Bar]:
    """A progress bar on stderr, if that is a terminal; `advance_to(done)` moves it."""
    return _Bar(description, total)


class _Bar:
    def __init__(self, description: str, total: int):
        self._description, self._total = description, total
        self._progress: Progress | None = None

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(self._description, total=self._total)
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._progress is not None
        self._progress.stop()

    def advance_to(self, done: int) -> None:
        assert self._progress is not None
        self._progress.update(self._task, completed=done)


def warn_not_finite(means: Mapping[str, Mapping[str, Any]]) -> None:
    """Names on stderr the methods that gave NaN or infinite logits or NaN scores, and in how many cases."""
    for name, values in means.items():
        if values["not_finite"]:
            print(
                f"minikv: {name}: NaN or infinite logits, or scores that are NaN, in {values['not_finite']} of "
                f"{values['cases']} cases; they are left out of the means",
                file=sys.stderr,
            )


def _evaluate(arguments: argparse.Namespace) -> int:
    from minikv_jax.evaluation.run import evaluate

    at_least(1, batch=arguments.batch)
    methods = make_methods(arguments)
    evaluator = make_evaluator(arguments)
    with progress(arguments.task, len(evaluator.cases) * len(methods)) as bar:
        report = evaluate(evaluator, methods, model_source=arguments.model, batch=arguments.batch, done=bar.advance_to)
    print(means_table(report["means"]).markdown())
    warn_not_finite(report["means"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from minikv_jax.evaluation.report import write_sweep
    from minikv_jax.evaluation.sweep import Sweep, grid
    from minikv_jax.methods.base import load_plugin

    at_least(1, batch=arguments.batch)
    if not arguments.no_figures:
        need_matplotlib(", or pass --no-figures")
    for file in arguments.plugin:
        load_plugin(file)
    axes = dict(arguments.sweep)
    if len(axes) < len(arguments.sweep):
        raise ValueError("--sweep names a field twice: give all its values at once")
    points = grid(arguments.method, axes, arguments.budget_bytes, arguments.set)
    evaluator = make_evaluator(arguments)
    sweep = Sweep.open(arguments.out, evaluator, points, arguments.set, arguments.model)
    for label, reason in sweep.skipped.items():
        print(f"minikv: {label} is skipped: {reason}", file=sys.stderr)
    with progress(arguments.task, len(evaluator.cases) * len(sweep.methods)) as bar:
        sweep.run(arguments.batch, bar.advance_to)
    results = sweep.results()
    means = {label: point["means"] for label, point in results["points"].items()}
    print(means_table(means).markdown())
    warn_not_finite(means)
    for path in write_sweep(arguments.out, results, figures=not arguments.no_figures):
        print(path)
    return 0


def need_matplotlib(otherwise: str = "") -> None:
    """Raises ValueError where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"figures need matplotlib: pip install minikv_jax[evaluation]{otherwise}")


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    key, values = key_value(text)
    return key, tuple(values.split(","))


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected shares such as 0.125,0.25") from error
    if not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}: expected shares above 0 and up to 1")
    return shares


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
