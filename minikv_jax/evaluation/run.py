"""Runs a task's cases with every method in batches of one padded length, and averages the results."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from minikv_jax import __version__, checks, meshes, schemas
from minikv_jax.evaluation.decoding import padded_length
from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.evaluation.measure import Measurement, check_case, measure_each
from minikv_jax.evaluation.task import Case, Task
from minikv_jax.files import sha256
from minikv_jax.methods import contracts
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import to_dict
from minikv_jax.models.decoder import Llama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "numpy")

# Metrics that are averaged over cases, in the order of tables.
METRICS = ("nll", "full_nll", "kl_to_full", "top1_agreement", "exact_match", "score", "cache_bytes", "full_cache_bytes")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A model and the cases of a task, on which any number of methods can be measured.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, if any.
      task: the task.
      cases: the task's cases.
      room: new tokens that every cache has room for: those of the longest case, so that cases share compiled programs.
      implementation: of the attention ops: "xla", "pallas", "cuda", or None for the fastest.
    """

    model: Llama
    tokenizer: PreTrainedTokenizerBase | None
    task: Task
    cases: tuple[Case, ...]
    room: int
    implementation: str | None = None

    @classmethod
    def create(
        cls,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase | None,
        task: Task,
        implementation: str | None = None,
    ) -> Evaluator:
        """Makes an evaluator with the cases of `task`.

        Args:
          model: the model.
          tokenizer: its tokenizer, if any.
          task: the task.
          implementation: of the attention ops: "xla", "pallas", "cuda", or None for the fastest.

        Raises:
          ValueError: a case does not fit the model, or two cases have the same name.
        """
        cases = tuple(task.cases(tokenizer, model.config.max_position_embeddings))
        for name, count in collections.Counter(case.name for case in cases).items():
            if count > 1:  # rows are identified by it
                raise ValueError(f"{count} cases have the name {checks.shown(name)}: expected one of each name")
        room = max(case.new_tokens for case in cases)
        data = 1 if model.mesh is None else model.mesh.shape[meshes.DATA]
        if data > 1 and any(case.question for case in cases):
            raise ValueError(f"mesh with data={data}: questions share the cache of one prompt; expected data=1")
        with schemas.naming(getattr(task, "data", task.name)):
            for case in cases:
                check_case(model.config, case, room)
        return cls(model, tokenizer, task, cases, room, implementation)

    @property
    def lengths(self) -> list[int]:
        """The different padded prompt lengths of the cases, in tokens."""
        return sorted({padded_length(self.model.config, case) for case in self.cases})

    def fit(self, methods: Mapping[str, SizedMethod], length: int) -> dict[str, Method]:
        """Checks methods against the model and fits them to a padded prompt length (`SizedMethod.fit`)."""
        for method in methods.values():
            contracts.check(method.method, self.model.config)
        return {
            name: method.fit(
                self.model.config, prompt_length=length, max_new_tokens=self.room, dtype=self.model.dtype.name
            )
            for name, method in methods.items()
        }

    def run(
        self, methods: Mapping[str, SizedMethod], batch: int = 1, cases: Iterable[Case] | None = None
    ) -> Iterator[tuple[Case, str, dict[str, Any]]]:
        """Measures cases in batches of one padded length.

        Args:
          methods: the methods by name.
          batch: cases per batch.
          cases: the cases to measure; None for all.

        Yields:
          A case, a method's name and the row of both. A row holds the `METRICS` that the case has, the generated `text`
            if any, the method's budgets, and `finite`. If that is false, a logit was not finite or a score was NaN, and
            all numbers but the bytes are None.
        """

        def length(case: Case) -> int:
            return padded_length(self.model.config, case)

        ordered = sorted(self.cases if cases is None else cases, key=length)
        for padded, group in itertools.groupby(ordered, key=length):
            fitted = self.fit(methods, padded)
            chunks = list(_chunks(list(group), batch))
            width = min(batch, max(map(len, chunks))) if chunks[0][0].question else batch
            for chunk in chunks:
                # The last case fills the batch up, because a smaller batch would need another compilation.
                filled = [*chunk, *itertools.repeat(chunk[-1], -len(chunk) % width)]
                arguments = (self.model, filled, fitted, self.room, self.implementation, width)
                for name, measurements in measure_each(*arguments):
                    for case, measurement in zip(chunk, measurements, strict=False):
                        yield case, name, self._row(case, fitted[name], measurement)

    def _row(self, case: Case, method: Method, measurement: Measurement) -> dict[str, Any]:
        row = dataclasses.asdict(measurement)
        generated = row.pop("generated")
        if generated is not None:
            text = self._text(generated)
            row |= {"text": text, "score": self.task.score(case, text) if measurement.finite else None}
        return row | budget_record(method)

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _chunks(cases: Sequence[Case], batch: int) -> Iterator[Sequence[Case]]:
    """Splits cases into batches, or into all the questions about each prompt."""
    by_prompt: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        by_prompt.setdefault(case.prompt if case.question else (), []).append(case)
    plain = by_prompt.pop((), [])
    yield from (plain[start : start + batch] for start in range(0, len(plain), batch))
    yield from by_prompt.values()


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages every metric over the finite rows, and counts the rows and those left out.

    `perplexity` is exp of the mean NLL.
    """
    counted = [row for row in rows if row["finite"]]
    result: dict[str, Any] = {"cases": len(rows), "not_finite": len(rows) - len(counted)}
    for name in METRICS:
        values = [row[name] for row in counted if row.get(name) is not None]
        if values:
            result[name] = math.fsum(values) / len(values)
    if "nll" in result:
        result["perplexity"] = math.exp(min(result["nll"], 700.0))
    return result


def summary(results: Sequence[tuple[Case, Mapping[str, Mapping[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Computes the `means` of each method over all cases and, if there are several groups, over each group."""
    groups = sorted({case.group for case, _ in results})
    by_method = {}
    for name in results[0][1]:
        by_method[name] = means([rows[name] for _, rows in results])
        if len(groups) > 1:
            by_method[name]["groups"] = {
                group: means([rows[name] for case, rows in results if case.group == group]) for group in groups
            }
    return by_method


def describe(evaluator: Evaluator, model_source: str) -> dict[str, Any]:
    """Records what a run's numbers depend on besides the methods: task, options, data, model, versions, device."""
    task = {"task": evaluator.task.name, "options": _options(evaluator.task)}
    return task | describe_model(evaluator.model, model_source, evaluator.implementation)


def describe_model(model: Llama, model_source: str, implementation: str | None) -> dict[str, Any]:
    """Records what every result depends on: model, versions, device."""
    return {
        "model": {"source": pathlib.Path(model_source).name, "sha256": parameters_sha256(model)},
        "dtype": model.dtype.name,
        "implementation": implementation,
        "device": jax.devices()[0].device_kind,
        "versions": {"minikv_jax": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def method_record(method: Method) -> dict[str, Any]:
    """Returns a method's fields as JSON values."""
    return to_dict(method)


def budget_record(method: Method) -> dict[str, Any]:
    """Returns a method's token budgets as JSON values."""
    values = to_dict(method)
    return {name: values[name] for name in ("heavy", "recent")}


def parameters_sha256(model: Llama) -> str:
    """Hashes the path, dtype, shape and bytes of every parameter."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _options(task: Any) -> dict[str, Any]:
    """Returns the task's options as JSON values, with the names and hashes of all files that it could read."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        values[field.name] = _file_record(value) if isinstance(value, pathlib.Path) else value
    return values


def _file_record(path: pathlib.Path) -> dict[str, Any]:
    if path.is_file():
        return {"name": path.name, "sha256": sha256(path)}
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    return {"name": path.name, "files": {file.name: sha256(file) for file in files}}


Report = dict[str, Any]


def evaluate(
    evaluator: Evaluator,
    methods: Mapping[str, SizedMethod],
    *,
    model_source: str = "",
    batch: int = 1,
    done: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Measures every method on every case of an evaluator.

    Args:
      evaluator: the model and the cases.
      methods: the methods by name.
      model_source: what the report calls the model, such as its path.
      batch: cases per batch.
      done: called with the number of rows measured so far, one per case and method.

    Returns:
      A report of JSON values, the same for the same arguments: what the numbers depend on, the methods, the means, and
        every case.

    Raises:
      ValueError: a method does not fit the model or its byte share. This is checked before anything runs.
    """
    for length in evaluator.lengths:
        evaluator.fit(methods, length)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case, name, row in evaluator.run(methods, batch):
        rows[case.name, name] = row
        done(len(rows))
    results = [(case, {name: rows[case.name, name] for name in methods}) for case in evaluator.cases]
    return describe(evaluator, model_source) | {
        "methods": {name: method_record(method.method) for name, method in methods.items()},
        "byte_share": {name: method.byte_share for name, method in methods.items() if method.byte_share is not None},
        "means": summary(results),
        "cases": [case_record(case) | {"methods": rows} for case, rows in results],
    }


def case_record(case: Case) -> dict[str, Any]:
    """Returns a case's sizes and tags as JSON values, without its text."""
    return {
        "name": case.name,
        "group": case.group,
        **case.tags,
        "prompt_tokens": len(case.prompt),
        "continuation_tokens": len(case.continuation),
    }
