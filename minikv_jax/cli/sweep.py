"""`minikv sweep`: measure a grid of methods and settings, with figures."""

from __future__ import annotations

import argparse
import sys

from minikv_jax.cli import output, shared, tasks
from minikv_jax.evaluation.report import write_sweep
from minikv_jax.evaluation.sweep import Sweep, grid
from minikv_jax.evaluation.sweep_store import check
from minikv_jax.evaluation.tables import means_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per task."""
    for _, subparser in tasks.add_tasks(parser):
        subparser.add_argument(
            "--sweep",
            type=_axis,
            action="append",
            default=[],
            metavar="KEY=VALUE,VALUE,...",
            help="values of a setting; several settings make a grid",
        )
        shared.add_directory(subparser)
        subparser.add_argument("--no-figures", action="store_true", help="no pareto.png and report.html")


def run(arguments: argparse.Namespace) -> int:
    """Measures the rows that --out lacks, prints the means, and writes the results."""
    if not arguments.no_figures:
        shared.need_matplotlib(", or pass --no-figures")
    shared.load_plugins(arguments)
    axes = dict(arguments.sweep)
    if len(axes) < len(arguments.sweep):
        raise ValueError("--sweep names a field twice: give all its values at once")
    points = grid(arguments.method, axes, arguments.budget_bytes, arguments.set)
    check(arguments.out)
    evaluator = tasks.make_evaluator(arguments)
    with Sweep.open(
        arguments.out, evaluator, points, arguments.set, arguments.model, plugins=arguments.plugin
    ) as sweep:
        for label, reason in sweep.skipped.items():
            print(f"minikv: {label} is skipped: {reason}", file=sys.stderr)
        for note in sweep.store.notes:
            print(f"minikv: {note}", file=sys.stderr)
        with output.ProgressBar(arguments.task, len(evaluator.cases) * len(sweep.methods)) as bar:
            sweep.run(arguments.batch, bar.advance_to)
        results = sweep.results()
        means = {label: point["means"] for label, point in results["points"].items()}
        print(means_table(means).markdown())
        output.warn_not_finite(means)
        for path in write_sweep(arguments.out, results, figures=not arguments.no_figures):
            print(path)
    return 0


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    key, values = shared.key_value(text)
    return key, tuple(values.split(","))
