"""Sweeps a grid of methods and settings over a task. A killed sweep can be resumed, because rows are saved one by one.

The directory of a sweep holds the files of `sweep_store` and those of `report.write_sweep`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from minikv_jax import files
from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.evaluation.run import Evaluator, case_record, describe, means, method_record
from minikv_jax.evaluation.sweep_store import Description, PointRecord, Rows, Store, opened
from minikv_jax.evaluation.task import Case
from minikv_jax.methods import lookup
from minikv_jax.methods.calibrated import CalibratedRotation
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import COMPONENTS, METHODS, to_dict


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell of the grid: a method as given, its swept settings, and optionally a share of bytes to fit it to."""

    method: str
    settings: tuple[tuple[str, str], ...]
    byte_share: float | None

    @property
    def label(self) -> str:
        """The point's name, unique in a sweep, such as `minikv:k_bits=4 @ 0.125`."""
        label = self.method
        if self.settings:
            swept = ",".join(f"{key}={value}" for key, value in self.settings)
            label += f"{',' if ':' in self.method else ':'}{swept}"
        return label if self.byte_share is None else f"{label} @ {self.byte_share:.4g}"

    def resolve(self, settings: Sequence[tuple[str, str]] = ()) -> SizedMethod:
        """Makes the method, changed by `settings` and then by its own. Raises ValueError if they are not valid."""
        return SizedMethod(lookup.parse(self.method, [*settings, *self.settings]), self.byte_share)


def grid(
    methods: Sequence[str],
    sweep: Mapping[str, Sequence[str]],
    byte_shares: Sequence[float] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> list[Point]:
    """Combines every method with every combination of swept values and every share of bytes.

    A method that keeps every token (after `settings`, as in `Point.resolve`) has no budget to fit and is one point.

    Args:
      methods: the methods as given, such as names.
      sweep: the values of each swept setting.
      byte_shares: fractions of the full cache's bytes.
      settings: names and values that apply to all methods.
    """
    axes = [[(key, value) for value in values] for key, values in sweep.items()]
    return [
        Point(method, swept, share)
        for method, swept in itertools.product(methods, itertools.product(*axes))
        for share in (byte_shares if byte_shares and not _keeps_all(method, [*settings, *swept]) else (None,))
    ]


def _keeps_all(method: str, settings: Sequence[tuple[str, str]]) -> bool:
    try:
        return lookup.parse(method, settings).keeps_all
    except ValueError:
        return False  # `Sweep.open` reports the error


@dataclasses.dataclass
class Sweep:
    """An open sweep: its points, those that cannot be measured, and the rows measured so far."""

    evaluator: Evaluator
    description: dict[str, Any]
    points: dict[str, Point]
    methods: dict[str, SizedMethod]
    skipped: dict[str, str]  # the reason by label
    store: Store

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        directory: pathlib.Path,
        evaluator: Evaluator,
        points: Sequence[Point],
        settings: Sequence[tuple[str, str]] = (),
        model_source: str = "",
        plugins: Sequence[pathlib.Path] = (),
    ) -> Iterator[Sweep]:
        """Starts a sweep in `directory`, or resumes the one there, and locks it for other processes.

        A point whose method is invalid or does not fit the model or its bytes is skipped, with the reason. Rows
        measured with another plugin file, calibration or version are dropped, as `store.notes` then says.

        Args:
          directory: the sweep's directory.
          evaluator: the model and the cases.
          points: the points to measure, which may include new ones.
          settings: names and values that apply to all methods.
          model_source: what the results call the model, such as its path.
          plugins: the files that registered plugins.

        Raises:
          ValueError: the directory holds a different sweep or damaged files, a point is given twice, or no point can be
            measured.
          BlockingIOError: another process runs the sweep in `directory`.
        """
        by_label = {point.label: point for point in points}
        if len(by_label) < len(points):
            raise ValueError(f"a point of the sweep is given twice: {', '.join(point.label for point in points)}")
        methods, skipped = _fitting(evaluator, by_label, settings)
        description = describe(evaluator, model_source)
        versions = description["versions"]
        records = {
            label: PointRecord(
                fields=_plain(method_record(method.method) | {"byte_share": method.byte_share}),
                files=_files(by_label[label].method, method.method, plugins),
                versions=versions,
            )
            for label, method in methods.items()
        }
        common = Description(**_plain({key: value for key, value in description.items() if key != "versions"}))
        with opened(directory, common, records, [case.name for case in evaluator.cases]) as store:
            yield cls(evaluator, description, by_label, methods, skipped, store)

    @property
    def rows(self) -> Rows:
        """The rows measured so far, by case and label."""
        return self.store.rows

    @property
    def missing(self) -> int:
        """Number of rows still to be measured."""
        return len(self.evaluator.cases) * len(self.methods) - sum(
            (case.name, label) in self.rows for case in self.evaluator.cases for label in self.methods
        )

    def run(self, batch: int = 1, done: Callable[[int], None] = lambda rows: None) -> None:
        """Measures the missing rows. `done` is called with the number of rows measured so far."""
        total = len(self.evaluator.cases) * len(self.methods)
        done(total - self.missing)
        todo: dict[tuple[str, ...], list[Case]] = {}  # cases by their missing points
        for case in self.evaluator.cases:
            labels = tuple(label for label in self.methods if (case.name, label) not in self.rows)
            if labels:
                todo.setdefault(labels, []).append(case)
        for labels, cases in todo.items():
            methods = {label: self.methods[label] for label in labels}
            for case, label, row in self.evaluator.run(methods, batch, cases):
                self.store.append({"case": case.name, "point": label, **row})
                self.rows[case.name, label] = row
                done(total - self.missing)

    def results(self) -> dict[str, Any]:
        """Returns the whole sweep as JSON values: description, points with their means, skipped points, every case."""
        cases = self.evaluator.cases
        return self.description | {
            "points": {
                label: {
                    "method": self.points[label].method,
                    "settings": dict(self.points[label].settings),
                    "byte_share": method.byte_share,
                    "fields": method_record(method.method),
                    "means": means([self.rows[case.name, label] for case in cases]),
                }
                for label, method in self.methods.items()
            },
            "skipped": self.skipped,
            "cases": [
                case_record(case) | {"points": {label: self.rows[case.name, label] for label in self.methods}}
                for case in cases
            ],
        }


def _fitting(
    evaluator: Evaluator, points: Mapping[str, Point], settings: Sequence[tuple[str, str]]
) -> tuple[dict[str, SizedMethod], dict[str, str]]:
    """Returns the methods of measurable points, and the reasons against the others. Raises ValueError if none is."""
    methods: dict[str, SizedMethod] = {}
    skipped: dict[str, str] = {}
    for label, point in points.items():
        try:
            method = point.resolve(settings)
            for length in evaluator.lengths:
                evaluator.fit({label: method}, length)
            methods[label] = method
        except ValueError as error:
            skipped[label] = str(error)
    if not methods:
        raise ValueError(f"no point of the sweep can be measured: {next(iter(skipped.values()))}")
    return methods, skipped


def _files(text: str, method: Method, plugins: Sequence[pathlib.Path]) -> dict[str, str]:
    """Hashes the files that a method given as `text` depends on: its calibration, and all plugins if it needs any."""
    values = to_dict(method)
    own = [registry.is_built_in(values[part]["name"]) for part, registry in COMPONENTS.items() if values[part]]
    name = text.partition(":")[0]
    used = [] if all(own) and (name not in METHODS or METHODS.is_built_in(name)) else list(plugins)
    if isinstance(method.quantizer, CalibratedRotation):
        used.append(
            pathlib.Path(method.quantizer.calibration) / "calibration.json"
        )  # it holds the hashes of its arrays
    return {path.name: files.sha256(path) for path in used}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to what JSON returns, with lists for tuples."""
    return json.loads(json.dumps(values))
