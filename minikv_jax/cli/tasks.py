"""Tasks as subcommands of `minikv evaluate` and `minikv sweep`, with one option per field of the task."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from minikv_jax.checks import at_least
from minikv_jax.cli import devices, shared
from minikv_jax.evaluation import data
from minikv_jax.evaluation.run import Evaluator
from minikv_jax.evaluation.task import Task
from minikv_jax.evaluation.tasks import TASKS
from minikv_jax.prompts import check_rows


def add_tasks(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Adds a subcommand per task, with the options of the run, the methods and the task; yields its name and it."""
    subparsers = parser.add_subparsers(required=True, metavar="TASK", dest="task")
    for name, task in TASKS.items():
        subparser = subparsers.add_parser(name, help=task.summary, description=task.__doc__)
        shared.add_run(subparser)
        devices.add_mesh(subparser)
        shared.add_methods(subparser)
        subparser.add_argument(
            "--batch", type=shared.integer, default=1, metavar="B", help="cases at a time; default: %(default)s"
        )
        for field in dataclasses.fields(typing.cast(Any, task)):
            _add_option(subparser, field)
        yield name, subparser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    parse, text, default = field.metadata["parse"], field.metadata["help"], field.default
    kind = parse if parse is str else shared.argument(parse)
    flag = f"--{field.name.replace('_', '-')}"
    if parse is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif default is dataclasses.MISSING:
        parser.add_argument(flag, type=kind, required=True, metavar="...", help=text)
    else:
        if default is not None:
            text += f"; default: {','.join(map(str, default)) if isinstance(default, tuple) else default}"
        parser.add_argument(flag, type=kind, default=default, metavar="...", help=text)


def make_evaluator(arguments: argparse.Namespace) -> Evaluator:
    """The task's cases and the loaded model. All options are checked before the model is loaded."""
    at_least(1, batch=arguments.batch)
    mesh = devices.read_mesh(arguments)
    check_rows(arguments.batch, mesh)
    task = _make_task(arguments)
    return Evaluator.create(*shared.load_model(arguments, mesh=mesh), task, arguments.implementation)


def _make_task(arguments: argparse.Namespace) -> Task:
    """The task with its options as given; a data set on the hub becomes a local directory."""
    task = TASKS[arguments.task]
    options = {}
    for field in dataclasses.fields(typing.cast(Any, task)):
        value = getattr(arguments, field.name)
        options[field.name] = data.locate(value, field.metadata["hub"]) if field.metadata["hub"] else value
    return task(**options)
