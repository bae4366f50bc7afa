"""`minikv evaluate`: measure the quality of methods."""

from __future__ import annotations

import argparse
import pathlib

from minikv_jax.cli import output, shared, tasks
from minikv_jax.evaluation import leaderboard
from minikv_jax.evaluation.run import evaluate
from minikv_jax.evaluation.tables import means_table
from minikv_jax.evaluation.tasks.kvpress import KVPress
from minikv_jax.models import hub


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per task."""
    for name, subparser in tasks.add_tasks(parser):
        shared.add_json(subparser)
        if name == KVPress.name:
            subparser.add_argument(
                "--out",
                type=shared.output_directory,
                metavar="DIR",
                help="also write a directory per method, as for kvpress's leaderboard",
            )


def run(arguments: argparse.Namespace) -> int:
    """Prints the means of every method; --json has every case's numbers."""
    methods = shared.read_methods(arguments)
    out = getattr(arguments, "out", None)
    if out is not None:
        leaderboard.check_limit(arguments.limit)
    evaluator = tasks.make_evaluator(arguments)
    with output.ProgressBar(arguments.task, len(evaluator.cases) * len(methods)) as bar:
        report = evaluate(evaluator, methods, model_source=arguments.model, batch=arguments.batch, done=bar.advance_to)
    print(means_table(report["means"]).markdown())
    output.warn_not_finite(report["means"])
    output.write_json(arguments.json, report, indent=1)
    if out is not None:
        name = arguments.model if hub.HUB_ID.fullmatch(arguments.model) else pathlib.Path(arguments.model).name
        for directory in leaderboard.write_results(out, evaluator, methods, report, name):
            print(directory)
    return 0
