"""`minikv reproduce`: compare a paper's LongBench table with a run of its methods on your model."""

from __future__ import annotations

import argparse
import pathlib

from minikv_jax.cli import devices, output, shared
from minikv_jax.evaluation import data
from minikv_jax.evaluation.reproduce import (
    PAPERS,
    Comparison,
    Plan,
    compare,
    comparison_table,
    notes,
    plan,
    published,
    without_continuations,
)
from minikv_jax.evaluation.run import Evaluator, evaluate
from minikv_jax.evaluation.tasks.longbench import HUB_FILES
from minikv_jax.models import hub
from minikv_jax.prompts import check_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the paper, and the options of the run."""
    parser.add_argument("paper", choices=PAPERS, help="whose table")
    shared.add_run(parser)
    devices.add_mesh(parser)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        default=pathlib.Path("THUDM/LongBench"),
        metavar="DIR",
        help="LongBench's data, as for `minikv evaluate longbench`; default: %(default)s on the hub",
    )
    parser.add_argument(
        "--prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="LongBench's dataset2prompt.json; default: the one in --data",
    )
    parser.add_argument("--limit", type=shared.positive, metavar="N", help="the first N cases of each set")
    parser.add_argument(
        "--max-prompt",
        type=shared.positive,
        metavar="N",
        help="prompt tokens at most; default: the paper's number, or what the model takes if that is less",
    )
    parser.add_argument(
        "--as", dest="published", metavar="NAME", help="the paper's model to compare with; default: yours"
    )
    parser.add_argument("--batch", type=shared.positive, default=1, metavar="B", help="cases at a time; default: 1")
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints our scores, the paper's and the differences, and what is missing."""
    mesh = devices.read_mesh(arguments)
    check_rows(arguments.batch, mesh)
    table = published(arguments.paper)
    model_name = arguments.published or table.model_name(arguments.model) or next(iter(table.models))
    config = hub.load_config(arguments.model)
    run = plan(
        table,
        model_name,
        config,
        data.locate(arguments.data, HUB_FILES),
        prompts=arguments.prompts,
        max_prompt=arguments.max_prompt,
        limit=arguments.limit,
    )
    loaded = shared.load_model(arguments, mesh=mesh)
    evaluator = without_continuations(Evaluator.create(*loaded, run.task, arguments.implementation))
    with output.ProgressBar(arguments.paper, len(evaluator.cases) * len(run.methods)) as bar:
        report = evaluate(
            evaluator, run.methods, model_source=arguments.model, batch=arguments.batch, done=bar.advance_to
        )
    comparison = compare(run, report)
    print(comparison_table(run, comparison).markdown())
    print()
    for line in notes(run, arguments.model, config):
        print(line)
    output.warn_not_finite(report["means"])
    output.write_json(arguments.json, _record(run, comparison) | report, indent=1)
    return 0


def _record(run: Plan, comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON values."""
    return {
        "paper": run.table.paper,
        "source": run.table.source,
        "published_model": run.model,
        "missing_sets": run.missing,
        "skipped_methods": run.skipped,
        "comparison": {
            label: {
                name: None if line is None else line._asdict()
                for name, line in (("ours", comparison.ours.get(label)), ("paper", comparison.paper.get(label)))
            }
            for label in run.table.methods
        },
    }
