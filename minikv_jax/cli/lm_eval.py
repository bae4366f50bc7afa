"""`minikv lm-eval`: run tasks of EleutherAI's lm-evaluation-harness with several methods."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minikv_jax.cli import output, shared
from minikv_jax.evaluation.run import describe_model, method_record
from minikv_jax.evaluation.tables import Table
from minikv_jax.methods.method import Method

if TYPE_CHECKING:
    from minikv_jax.integrations.lm_eval import CompressedLM

_SAMPLE = ("doc_id", "target", "filtered_resps", "filter")  # of a sample, beside its scores; not the prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model, the methods and the harness."""
    shared.add_run(parser)
    shared.add_method(parser, action="append", required=True, help="see `minikv methods`; repeatable")
    shared.add_settings(parser)
    parser.add_argument(
        "--tasks", type=_names, required=True, metavar="NAME[,NAME...]", help="tasks, groups, tags, or patterns of them"
    )
    parser.add_argument("--include-path", type=pathlib.Path, metavar="DIR", help="a directory of your own task files")
    parser.add_argument("--limit", type=shared.positive, metavar="N", help="the first N documents of each task")
    parser.add_argument("--batch", type=shared.positive, default=1, metavar="B", help="contexts at a time; default: 1")
    parser.add_argument("--num-fewshot", type=shared.integer, metavar="N", help="examples; default: the task's number")
    parser.add_argument(
        "--context",
        type=shared.positive,
        metavar="N",
        help="tokens of a context at most; default: what the model can take",
    )
    parser.add_argument(
        "--chat-template", action="store_true", help="put prompts into the model's chat template, examples as turns"
    )
    parser.add_argument(
        "--metadata", type=_object, metavar="JSON", help='for tasks that make up prompts: {"max_seq_lengths": [4096]}'
    )
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints every metric of every task, a column per method; --json also has every document's answers."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval needs the package lm_eval: pip install minikv_jax[lm-eval]")
    from minikv_jax.integrations.lm_eval import CompressedLM  # optional
    from minikv_jax.integrations.lm_eval_tasks import TaskSelection, run_tasks

    methods = {name: sized.method for name, sized in shared.read_methods(arguments).items()}
    with output.status("reading task files"):
        selection = TaskSelection(arguments.tasks, arguments.include_path, arguments.metadata)
    model, tokenizer = shared.load_model(arguments, methods.values())
    how = {"batch_size": arguments.batch, "context": arguments.context, "implementation": arguments.implementation}
    models = {name: CompressedLM(model, tokenizer, method, **how) for name, method in methods.items()}
    assert tokenizer is not None
    with output.status("reading tasks"):
        tasks = selection.load(tokenizer, arguments.num_fewshot)
    results: dict[str, Any] = {}
    for name, lm in models.items():
        results[name] = run_tasks(
            lm, tasks, limit=arguments.limit, chat_template=arguments.chat_template, samples=arguments.json is not None
        )
        _note(name, lm)
    print(_table(results).markdown())
    record = describe_model(model, arguments.model, arguments.implementation)
    record["versions"]["lm_eval"] = importlib.metadata.version("lm_eval")
    output.write_json(arguments.json, _plain(record | _record(arguments, methods, results)), indent=1)
    return 0


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected names of tasks")
    return names


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object")
    return value


def _note(name: str, lm: CompressedLM) -> None:
    """Says on stderr what the scores do not show."""
    if lm.cut:
        print(f"minikv: {name}: {lm.cut} contexts did not fit and lost their middle", file=sys.stderr)
    if lm.not_finite:
        print(f"minikv: {name}: NaN or infinite logits in {lm.not_finite} requests", file=sys.stderr)


def _scores(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Every metric by task and name, without standard errors."""
    return {
        (task, metric.removesuffix(",none")): value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "," in metric and not metric.split(",")[0].endswith("_stderr")
    }


def _table(results: Mapping[str, Any]) -> Table:
    by_method = {name: _scores(values) for name, values in results.items()}
    rows = list(dict.fromkeys(row for scores in by_method.values() for row in scores))
    cells = [[f"{scores[row]:.4f}" if row in scores else "" for scores in by_method.values()] for row in rows]
    return Table(["task", "metric", *by_method], [[*row, *line] for row, line in zip(rows, cells, strict=True)])


def _record(arguments: argparse.Namespace, methods: Mapping[str, Method], results: Mapping[str, Any]) -> dict[str, Any]:
    """The options, the methods and the harness's results as JSON values."""
    options = {name: getattr(arguments, name) for name in ("limit", "batch", "num_fewshot", "context", "chat_template")}
    first = next(iter(results.values()))
    return {
        "options": options | {"tasks": arguments.tasks},
        "tasks": {name: first[name] for name in ("versions", "n-shot", "n-samples", "higher_is_better")},
        "methods": {name: method_record(method) for name, method in methods.items()},
        "results": {name: values["results"] for name, values in results.items()},
        "samples": {
            name: {task: [_sample(sample) for sample in samples] for task, samples in values.get("samples", {}).items()}
            for name, values in results.items()
        },
    }


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sample[name] for name in (*_SAMPLE, *sample["metrics"])}


def _plain(value: Any) -> Any:
    """Makes JSON values: NaN and infinity become null, NumPy's numbers Python's, and what is none of these text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
