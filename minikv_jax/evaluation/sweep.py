"""A grid of methods and fields over one task. Every measured row is on disk at once: a sweep that was killed goes on.

A sweep's directory holds `sweep.json` (what the numbers depend on, and every point's fields), `rows.jsonl` (a line per
case and point, appended as they are measured), and the files that `report.write_sweep` makes of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.evaluation.run import Evaluator, case_record, describe, means, method_record
from minikv_jax.evaluation.task import Case
from minikv_jax.methods import lookup


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell of the grid: a method as given, the swept settings, and the share of bytes it is fitted to, if any."""

    method: str
    settings: tuple[tuple[str, str], ...]
    byte_share: float | None

    @property
    def label(self) -> str:
        """Unique in a sweep: `minikv:k_bits=4 @ 0.125`."""
        label = self.method
        if self.settings:
            swept = ",".join(f"{key}={value}" for key, value in self.settings)
            label += f"{',' if ':' in self.method else ':'}{swept}"
        return label if self.byte_share is None else f"{label} @ {self.byte_share:.4g}"

    def resolve(self, settings: Sequence[tuple[str, str]] = ()) -> SizedMethod:
        """The method, its fields changed by `settings` and then by its own; ValueError if they make none."""
        return SizedMethod(lookup.parse(self.method, [*settings, *self.settings]), self.byte_share)


def grid(
    methods: Sequence[str],
    sweep: Mapping[str, Sequence[str]],
    byte_shares: Sequence[float] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> list[Point]:
    """Every method with every combination of the swept values, and with every share of bytes.

    A method that keeps every token (after `settings`, as in `Point.resolve`) has no budget to fit: it is one point.
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
        return False  # `Sweep.open` says what is wrong


@dataclasses.dataclass
class Sweep:
    """The state of a sweep: its points, those that cannot be measured, and the rows measured so far."""

    directory: pathlib.Path
    evaluator: Evaluator
    description: dict[str, Any]
    points: dict[str, Point]
    methods: dict[str, SizedMethod]
    skipped: dict[str, str]  # label -> why the point cannot be measured
    rows: dict[tuple[str, str], dict[str, Any]]  # (case, label) -> row

    @classmethod
    def open(
        cls,
        directory: pathlib.Path,
        evaluator: Evaluator,
        points: Sequence[Point],
        settings: Sequence[tuple[str, str]] = (),
        model_source: str = "",
    ) -> Sweep:
        """Starts a sweep, or resumes the one in `directory`, perhaps with more points.

        A point whose method is invalid or does not fit the model or its bytes is skipped with the reason.

        Raises:
          ValueError: the directory holds a sweep of something else; a point is given twice; no point can be measured.
        """
        methods: dict[str, SizedMethod] = {}
        skipped: dict[str, str] = {}
        by_label = {point.label: point for point in points}
        if len(by_label) < len(points):
            raise ValueError(f"a point of the sweep is given twice: {', '.join(point.label for point in points)}")
        for label, point in by_label.items():
            try:
                method = point.resolve(settings)
                for length in evaluator.lengths:
                    evaluator.fit({label: method}, length)
                methods[label] = method
            except ValueError as error:
                skipped[label] = str(error)
        if not methods:
            raise ValueError(f"no point of the sweep can be measured: {next(iter(skipped.values()))}")
        sweep = cls(directory, evaluator, describe(evaluator, model_source), by_label, methods, skipped, {})
        sweep._resume()
        return sweep

    @property
    def missing(self) -> int:
        """Rows still to be measured."""
        return len(self.evaluator.cases) * len(self.methods) - sum(
            (case.name, label) in self.rows for case in self.evaluator.cases for label in self.methods
        )

    def run(self, batch: int = 1, done: Callable[[int], None] = lambda rows: None) -> None:
        """Measures the missing rows. `done` is called with the number of rows measured so far."""
        total = len(self.evaluator.cases) * len(self.methods)
        done(total - self.missing)
        todo: dict[tuple[str, ...], list[Case]] = {}  # cases by the points that they lack
        for case in self.evaluator.cases:
            labels = tuple(label for label in self.methods if (case.name, label) not in self.rows)
            if labels:
                todo.setdefault(labels, []).append(case)
        with (self.directory / "rows.jsonl").open("a", encoding="utf-8") as stream:
            for labels, cases in todo.items():
                methods = {label: self.methods[label] for label in labels}
                for case, label, row in self.evaluator.run(methods, batch, cases):
                    stream.write(json.dumps({"case": case.name, "point": label, **row}) + "\n")
                    stream.flush()
                    self.rows[case.name, label] = row
                    done(total - self.missing)

    def results(self) -> dict[str, Any]:
        """The whole sweep as JSON values: description, points with their means, skipped points, every case."""
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

    def _resume(self) -> None:
        """Reads the rows that the directory holds, and writes the sweep's description."""
        self.directory.mkdir(parents=True, exist_ok=True)
        header, rows = self.directory / "sweep.json", self.directory / "rows.jsonl"
        # Through JSON and back, so that tuples compare as the lists they become.
        description = json.loads(json.dumps(self.description))
        fields = json.loads(json.dumps({label: _fields(method) for label, method in self.methods.items()}))
        if header.is_file():
            old = json.loads(header.read_text(encoding="utf-8"))
            different = [key for key, value in description.items() if old["description"].get(key) != value]
            different += [label for label in fields if label in old["points"] and old["points"][label] != fields[label]]
            if different:
                raise ValueError(
                    f"{self.directory} holds another sweep: {', '.join(different)} differ; give another directory"
                )
            fields = old["points"] | fields
        header.write_text(json.dumps({"description": description, "points": fields}, indent=1) + "\n")
        if rows.is_file():
            self.rows = _read_rows(rows)


def _fields(method: SizedMethod) -> dict[str, Any]:
    return method_record(method.method) | {"byte_share": method.byte_share}


def _read_rows(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file by case and point. If its last line is torn, that line is cut off."""
    rows, complete_bytes = {}, 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        rows[row.pop("case"), row.pop("point")] = row
        complete_bytes += len(line)
    with path.open("r+b") as stream:
        stream.truncate(complete_bytes)
    return rows
