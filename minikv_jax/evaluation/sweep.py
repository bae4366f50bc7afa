"""A grid of methods and fields over one task. Every measured row is on disk at once: a sweep that was killed goes on.

A sweep's directory holds `sweep.json` (what the numbers depend on, and every point's fields), `rows.jsonl` (a line per
case and point, appended as they are measured), and what `write_results` makes of them.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minikv_jax.evaluation.fit import Method
from minikv_jax.evaluation.run import METRICS, Evaluator, case_record, describe, means
from minikv_jax.methods import lookup as presets


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell of the grid: a method as given, the swept settings, and the share of bytes it is fitted to, if any."""

    method: str
    settings: tuple[tuple[str, str], ...]
    byte_share: float | None

    @property
    def label(self) -> str:
        """Unique in a sweep: `minikv:k_bits=4 @ 0.125`."""
        swept = ",".join(f"{key}={value}" for key, value in self.settings)
        separator = "," if ":" in self.method else ":"
        share = "" if self.byte_share is None else f" @ {self.byte_share:.4g}"
        return f"{self.method}{separator * bool(swept)}{swept}{share}"

    def resolve(self, settings: Sequence[tuple[str, str]] = ()) -> Method:
        """The method, its fields changed by `settings` and then by its own; ValueError if they make none."""
        return Method(presets.parse(self.method, [*settings, *self.settings]), self.byte_share)


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
        return presets.parse(method, settings).keeps_all
    except ValueError:
        return False  # `Sweep.open` says what is wrong


@dataclasses.dataclass
class Sweep:
    """The state of a sweep: its points, those that cannot be, and the rows measured so far."""

    directory: pathlib.Path
    evaluator: Evaluator
    description: dict[str, Any]
    points: dict[str, Point]
    methods: dict[str, Method]
    skipped: dict[str, str]  # label -> why the point cannot be
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
        """A new sweep, or the one in `directory`, to which points may have been added.

        A point that makes no valid method, or none that fits the model or its bytes, is skipped with the reason.

        Raises:
          ValueError: the directory holds a sweep of something else; a point is given twice; no point can be.
        """
        methods: dict[str, Method] = {}
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
        """Measures what is missing. `done` is told how many rows there are, of this sweep's cases and points."""
        total = len(self.evaluator.cases) * len(self.methods)
        done(total - self.missing)
        todo: dict[tuple[str, ...], list] = {}
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
        """All there is to say, as JSON: description, points with their means, what was skipped, every case."""
        cases = self.evaluator.cases
        return self.description | {
            "points": {
                label: {
                    "method": self.points[label].method,
                    "settings": dict(self.points[label].settings),
                    "byte_share": method.byte_share,
                    "fields": dataclasses.asdict(method.config),
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
        """Reads what the directory holds of this sweep, and writes down what it now is."""
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


def _fields(method: Method) -> dict[str, Any]:
    return dataclasses.asdict(method.config) | {"byte_share": method.byte_share}


def _read_rows(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file whose last line may be torn; that one is cut off."""
    found, whole = {}, 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        found[row.pop("case"), row.pop("point")] = row
        whole += len(line)
    with path.open("r+b") as stream:
        stream.truncate(whole)
    return found


def write_results(directory: pathlib.Path, results: Mapping[str, Any], figures: bool = True) -> list[pathlib.Path]:
    """Writes results.json and results.csv, and with `figures` pareto.png and report.html; returns the paths.

    Raises:
      ImportError: figures without matplotlib.
    """
    paths = [directory / "results.json", directory / "results.csv"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _write_csv(paths[1], results["points"])
    if figures:
        from minikv_jax.evaluation.figures import pareto
        from minikv_jax.evaluation.report import sweep_report

        image = pareto(results["points"], title=results["task"])
        paths += [directory / "pareto.png", directory / "report.html"]
        paths[2].write_bytes(image)
        paths[3].write_text(sweep_report(results, image), encoding="utf-8")
    return paths


def _write_csv(path: pathlib.Path, points: Mapping[str, Mapping[str, Any]]) -> None:
    settings = sorted({key for point in points.values() for key in point["settings"]})
    columns = ["point", "method", *settings, "byte_share", "cases", "not_finite", "perplexity", *METRICS]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        for label, point in points.items():
            share = "" if point["byte_share"] is None else point["byte_share"]
            own = {"point": label, "method": point["method"], "byte_share": share}
            writer.writerow(own | point["settings"] | point["means"])
