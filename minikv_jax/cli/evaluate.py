"""`minikv evaluate`: measure the quality of methods."""

from __future__ import annotations

import argparse

from minikv_jax.cli import output, shared, tasks
from minikv_jax.evaluation.run import evaluate
from minikv_jax.evaluation.tables import means_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per task."""
    for subparser in tasks.add_tasks(parser):
        shared.add_json(subparser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the means of every method; --json has every case's numbers."""
    methods = shared.read_methods(arguments)
    evaluator = tasks.make_evaluator(arguments)
    with output.ProgressBar(arguments.task, len(evaluator.cases) * len(methods)) as bar:
        report = evaluate(evaluator, methods, model_source=arguments.model, batch=arguments.batch, done=bar.advance_to)
    print(means_table(report["means"]).markdown())
    output.warn_not_finite(report["means"])
    output.write_json(arguments.json, report, indent=1)
    return 0
