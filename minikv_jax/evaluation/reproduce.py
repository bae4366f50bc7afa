"""Compares methods on LongBench with a paper's table: the paper's methods, lengths and budgets, and its numbers.

The tables are in `published/`, a file per paper with source and table number.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from minikv_jax import files, schemas
from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.evaluation.run import Evaluator, Report
from minikv_jax.evaluation.tables import Table
from minikv_jax.evaluation.tasks.longbench import DATASETS, LongBench
from minikv_jax.methods import contracts, lookup
from minikv_jax.models.config import ModelConfig

_DIRECTORY = pathlib.Path(__file__).with_name("published")
PAPERS = tuple(sorted(path.stem for path in _DIRECTORY.glob("*.json")))
_HEADINGS = {
    "narrativeqa": "NrtvQA",
    "qasper": "Qasper",
    "multifieldqa_en": "MF-en",
    "hotpotqa": "Hotpot",
    "2wikimqa": "2Wiki",
    "musique": "Musique",
    "gov_report": "GovRep",
    "qmsum": "QMSum",
    "multi_news": "MNews",
    "trec": "TREC",
    "triviaqa": "Trivia",
    "samsum": "SAMSum",
    "passage_count": "PCount",
    "passage_retrieval_en": "PRetr",
    "lcc": "Lcc",
    "repobench-p": "RB-P",
}


class PublishedModel(schemas.Schema):
    """A paper's scores of one model, in percent.

    Attributes:
      table: where they are printed.
      names: names of the model's repositories on the hub, without the owner.
      sets: LongBench's data sets, in the order of the scores.
      scores: by the paper's name of the method.
      averages: the printed averages; empty if none is.
    """

    table: str
    names: list[str]
    sets: list[str]
    scores: dict[str, list[float]]
    averages: dict[str, float]

    @model_validator(mode="after")
    def _scores_match_the_sets(self) -> Self:
        if any(len(scores) != len(self.sets) for scores in self.scores.values()):
            raise ValueError("expected a score of every set")
        return self


class Published(schemas.Schema):
    """A paper's table and its settings.

    Attributes:
      paper: its short name.
      source: its version on arXiv.
      settings: what the paper ran, in a sentence or two.
      max_prompt: tokens of a prompt at most; None for what the model takes.
      methods: this library's methods by the paper's names; the first keeps everything.
      models: the scores by the paper's names of the models.
    """

    paper: str
    source: str
    settings: str
    max_prompt: int | None
    methods: dict[str, str] = Field(min_length=1)
    models: dict[str, PublishedModel] = Field(min_length=1)

    def model_name(self, source: str) -> str | None:
        """The paper's name of the model at a path or on the hub; None if the paper has no such model."""
        name = pathlib.PurePath(source).name.lower()
        return next((key for key, model in self.models.items() if name in map(str.lower, model.names)), None)


def published(paper: str) -> Published:
    """Reads the table of one of `PAPERS`."""
    path = _DIRECTORY / f"{paper}.json"
    return schemas.validate(Published, files.read_json(path), source=path)


class Plan(NamedTuple):
    """A run of a paper's table on some data.

    Attributes:
      table: the paper's table.
      model: the paper's name of the model whose scores are compared.
      task: the cases.
      missing: sets of the table that the data lack.
      methods: the methods that fit the model, by the paper's names.
      skipped: why the others do not.
    """

    table: Published
    model: str
    task: LongBench
    missing: tuple[str, ...]
    methods: dict[str, SizedMethod]
    skipped: dict[str, str]

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets that are run."""
        assert self.task.datasets is not None
        return self.task.datasets

    @property
    def baseline(self) -> str:
        """The paper's name of the method that keeps everything."""
        return next(iter(self.table.methods))


def plan(
    table: Published,
    model: str,
    config: ModelConfig,
    data: pathlib.Path,
    *,
    prompts: pathlib.Path | None = None,
    max_prompt: int | None = None,
    limit: int | None = None,
) -> Plan:
    """Prepares a run: finds the sets that the data have and the methods that fit the model.

    Args:
      table: the paper's table.
      model: the paper's name of the model to compare with.
      config: the model that runs.
      data: a directory in LongBench's format (the task `longbench`).
      prompts: LongBench's prompts; None for `data / "dataset2prompt.json"`.
      max_prompt: tokens of a prompt at most; None for the paper's number, or fewer if the model has too few positions.
      limit: take the first `limit` cases of each set.

    Raises:
      ValueError: the table has no such model, a row is malformed, or `max_prompt` is below 1 or beyond the model.
      FileNotFoundError: the data have none of the table's sets, or lack the prompts.
    """
    if model not in table.models:
        raise ValueError(f"{table.paper} has no scores of {model!r}: expected one of {', '.join(table.models)}")
    wanted = table.models[model].sets
    sets = tuple(name for name in wanted if (data / f"{name}.jsonl").is_file())
    if not sets:
        raise FileNotFoundError(f"{data} has none of {', '.join(f'{name}.jsonl' for name in wanted)}")
    room = config.max_position_embeddings - max(DATASETS[name].max_new_tokens for name in sets)
    if max_prompt is not None and max_prompt > room:
        raise ValueError(
            f"max_prompt={max_prompt}: beside the longest answer the model's positions leave room for {room} tokens"
        )
    context = min(room, table.max_prompt or room) if max_prompt is None else max_prompt
    task = LongBench(data, prompts, sets, context=context, limit=limit)
    methods, skipped = {}, {}
    for label, text in table.methods.items():
        method = lookup.parse(text)
        try:
            contracts.check(method, config)
            methods[label] = SizedMethod(method)
        except ValueError as error:
            skipped[label] = str(error)
    return Plan(table, model, task, tuple(name for name in wanted if name not in sets), methods, skipped)


def without_continuations(evaluator: Evaluator) -> Evaluator:
    """Leaves out the known continuations, because the table needs only the scores of generated answers."""
    cases = (dataclasses.replace(case, continuation=()) for case in evaluator.cases)
    return dataclasses.replace(evaluator, cases=tuple(cases))


class Line(NamedTuple):
    """Scores of a method in percent.

    Attributes:
      scores: by data set; None where there is none.
      mean: over the sets of the run; None if one lacks a score.
      recovered: `mean` relative to the baseline's; None if either is missing or the baseline's is 0.
    """

    scores: dict[str, float | None]
    mean: float | None
    recovered: float | None


class Comparison(NamedTuple):
    """Our scores and the paper's, by the paper's names of the methods."""

    ours: dict[str, Line]
    paper: dict[str, Line]


def compare(run: Plan, report: Report) -> Comparison:
    """Puts the scores of a run beside the paper's.

    Args:
      run: the plan.
      report: of `evaluate` with the plan's methods.
    """
    model = run.table.models[run.model]
    ours: dict[str, Mapping[str, float | None]] = {}
    for label, means in report["means"].items():
        groups = means.get("groups", {run.sets[0]: means})
        ours[label] = {name: _percent(groups[name].get("score")) for name in run.sets}
    paper = {label: dict(zip(model.sets, model.scores[label], strict=True)) for label in model.scores}
    return Comparison(_lines(ours, run), _lines(paper, run))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _lines(scores: Mapping[str, Mapping[str, float | None]], run: Plan) -> dict[str, Line]:
    def mean(label: str) -> float | None:
        values = [scores[label].get(name) for name in run.sets] if label in scores else [None]
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if len(known) == len(values) else None

    full = mean(run.baseline)
    lines = {}
    for label in scores:
        own = mean(label)
        lines[label] = Line(dict(scores[label]), own, own / full if own is not None and full else None)
    return lines


def comparison_table(run: Plan, comparison: Comparison) -> Table:
    """Makes the table: our scores, the paper's and the differences, per method. Sets that were not run lack ours."""
    sets = run.table.models[run.model].sets
    columns = ["method", "", *(_HEADINGS[name] for name in sets), f"mean of {len(run.sets)}", "of full"]
    rows = []
    for label in run.table.methods:
        ours, paper = comparison.ours.get(label), comparison.paper.get(label)
        pairs = [_pair(ours, paper, name) for name in sets]
        means = (ours and ours.mean, paper and paper.mean)
        shares = (ours and ours.recovered, paper and paper.recovered)
        rows.append([label, "ours", *(_number(pair[0]) for pair in pairs), _number(means[0]), _share(shares[0])])
        rows.append(["", "paper", *(_number(pair[1]) for pair in pairs), _number(means[1]), _share(shares[1])])
        rows.append(["", "difference", *map(_difference, pairs), _difference(means), _points(shares)])
    return Table(columns, rows)


_Pair = tuple[float | None, float | None]


def _pair(ours: Line | None, paper: Line | None, name: str) -> _Pair:
    return (ours.scores.get(name) if ours else None), (paper.scores.get(name) if paper else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _difference(pair: _Pair) -> str:
    return "" if pair[0] is None or pair[1] is None else f"{pair[0] - pair[1]:+.2f}"


def _points(pair: _Pair) -> str:
    return "" if pair[0] is None or pair[1] is None else f"{100 * (pair[0] - pair[1]):+.1f}"


def notes(run: Plan, model_source: str, config: ModelConfig) -> Sequence[str]:
    """Says what the table compares, and names what is missing from it."""
    table, model = run.table, run.table.models[run.model]
    context = run.task.context
    lines = [f"Paper: {table.paper}, {table.source}, {model.table}, {run.model}. {table.settings}"]
    if table.model_name(model_source) != run.model:
        name = pathlib.PurePath(model_source).name
        lines.append(f"The paper's scores are not of {name}: compare the shares of full, not the scores.")
    if context != table.max_prompt:
        of_paper = "what the model takes" if table.max_prompt is None else f"{table.max_prompt:,} tokens"
        lines.append(
            f"Prompts are cut to {context:,} tokens, the paper's to {of_paper}; the model has "
            f"{config.max_position_embeddings:,} positions."
        )
    if run.task.limit is not None:
        lines.append(f"Only the first {run.task.limit} cases of each set were run.")
    if run.missing:
        lines.append(
            f"Sets without data: {', '.join(run.missing)}. All means are over the {len(run.sets)} sets that were run."
        )
    if model.averages:
        printed = ", ".join(f"{label} {value:.2f}" for label, value in model.averages.items())
        lines.append(f"The paper's averages over all {len(model.sets)} sets: {printed}.")
    lines += [f"{label} was not run: {reason}" for label, reason in run.skipped.items()]
    if unprinted := [label for label in table.methods if label not in model.scores]:
        lines.append(f"The paper prints no scores of {', '.join(unprinted)} for this model.")
    return lines
