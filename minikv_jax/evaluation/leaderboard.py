"""Writes results in the layout of kvpress's leaderboard (https://github.com/NVIDIA/kvpress, evaluation/).

A directory per method is named after the data set, the model, the method and its compression ratio. It holds
predictions.csv, metrics.json and config.yaml.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from minikv_jax import files
from minikv_jax.cache import memory
from minikv_jax.evaluation.decoding import padded_length
from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.evaluation.run import Evaluator, method_record
from minikv_jax.evaluation.tasks.kvpress import KVPress
from minikv_jax.methods import lookup
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig

_NOT_IN_NAMES = re.compile(r"[^\w.,=+@-]+")


def compression_ratio(model: ModelConfig, method: Method, context_tokens: int) -> float:
    """Share of a 16-bit cache's bytes that a method saves on a context, everything counted.

    For a method that evicts and does not quantise it is kvpress's ratio, the share of tokens evicted, within 0.01 for
    contexts of a thousand tokens and more.
    """
    report = memory.report(model, method, prompt_length=context_tokens, max_new_tokens=1, dtype="bfloat16")
    return max(report.saved, 0.0)


def check_limit(limit: int | None) -> None:
    """Raises ValueError for a part of the rows, which would look like a result on all of them."""
    if limit is not None:
        raise ValueError(f"limit={limit}: results for the leaderboard are of all rows; expected no limit")


def write_results(
    directory: pathlib.Path,
    evaluator: Evaluator,
    methods: Mapping[str, SizedMethod],
    report: Mapping[str, Any],
    model_name: str,
) -> list[pathlib.Path]:
    """Writes a directory per method.

    Args:
      directory: where the directories go. An existing one is kept, and the new one is its subdirectory 1, 2, ..., as
        in kvpress.
      evaluator: of a `KVPress` task.
      methods: the methods by name.
      report: the result of `evaluate` with these methods.
      model_name: what the results call the model: its name on the hub, or another.

    Returns:
      The directories.

    Raises:
      ValueError: the task is another, or takes only a part of the rows.
      OSError: a file cannot be written.
    """
    task = evaluator.task
    if not isinstance(task, KVPress):
        raise ValueError(f"task {task.name!r}: expected 'kvpress'")
    check_limit(task.limit)
    rows = task.rows()
    written = []
    for name, method in methods.items():
        answers = [case["methods"][name]["text"] for case in report["cases"]]
        ratio = _mean_ratio(evaluator, method)
        is_full = method.method == lookup.get("full")
        config = _config(task, report, "no_press" if is_full else name, ratio, method.method) | {"model": model_name}
        target = _new_directory(directory / _directory_name(config))
        columns = {"predicted_answer": answers, "compression_ratio": [ratio] * len(rows)}
        files.write_text(target / "predictions.csv", _predictions(rows, columns))
        files.write_json(target / "metrics.json", task.metrics(rows, answers), indent=4)
        files.write_text(target / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        written.append(target)
    return written


def _mean_ratio(evaluator: Evaluator, method: SizedMethod) -> float:
    """Mean compression ratio over all rows."""
    config = evaluator.model.config
    fitted = {padded: evaluator.fit({"": method}, padded)[""] for padded in evaluator.lengths}
    ratios = [
        compression_ratio(config, fitted[padded_length(config, case)], len(case.prompt)) for case in evaluator.cases
    ]
    return sum(ratios) / len(ratios)


def _config(task: KVPress, report: Mapping[str, Any], name: str, ratio: float, method: Method) -> dict[str, Any]:
    """The keys of kvpress's configuration."""
    return {
        "dataset": task.benchmark,
        "data_dir": task.data_dir,
        "model": report["model"]["source"],
        "device": report["device"],
        "press_name": name,
        "compression_ratio": round(ratio, 4),
        "key_channel_compression_ratio": None,
        "fraction": 1.0,
        "max_new_tokens": task.max_new_tokens,
        "max_context_length": task.context,
        "query_aware": task.query_aware,
        "needle_depth": None,
        "compression_interval": None,
        "target_size": None,
        "hidden_states_buffer_size": None,
        "output_dir": "./results",
        "log_level": "INFO",
        "model_kwargs": {"dtype": report["dtype"]},
        "press_init_command": f"minikv_jax {report['versions']['minikv_jax']}: {method_record(method)}",
        "seed": 42,
        "fp8": False,
    }


def _directory_name(config: Mapping[str, Any]) -> str:
    parts = [
        config["dataset"],
        config["data_dir"] or "",
        config["model"].replace("/", "--"),
        config["press_name"],
        f"{config['compression_ratio']:.2f}",
        f"max_context{config['max_context_length']}" if config["max_context_length"] else "",
        "query_aware" if config["query_aware"] else "",
    ]
    return "__".join(_NOT_IN_NAMES.sub("-", part) for part in parts if part)


def _new_directory(path: pathlib.Path) -> pathlib.Path:
    """Makes a directory, or the first free numbered one in it if it exists."""
    target, number = path, 0
    while target.exists():
        number += 1
        target = path / str(number)
    target.mkdir(parents=True)
    return target


def _predictions(rows: list[dict[str, Any]], columns: Mapping[str, list[Any]]) -> str:
    """All columns but the context, with the predicted answers."""
    names = [name for name in rows[0] if name != "context"]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow([*names, *columns])
    for row, *more in zip(rows, *columns.values(), strict=True):
        writer.writerow([*(row.get(name) for name in names), *more])
    return stream.getvalue()
