"""Keeps the rows of a sweep in a directory, which one process at a time may open.

`sweep.json` holds what all numbers depend on and, for every point, its fields, the SHA-256 of its plugins, and the
versions it was measured with. `rows.jsonl` holds a line per case and point, appended when it is measured.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from minikv_jax import checks, files
from minikv_jax.methods.records import Amount
from minikv_jax.schemas import Schema, validate

_HEADER, _ROWS = "sweep.json", "rows.jsonl"

_Number = float | None
_Bytes = Annotated[int, Field(ge=0, lt=1 << 60)]

Rows = dict[tuple[str, str], dict[str, Any]]  # by case and point


class _Model(Schema):
    source: str
    sha256: str


class Description(Schema):
    """Record of what the numbers of all points depend on."""

    task: str
    options: dict[str, Any]
    model: _Model
    dtype: str
    implementation: str | None
    device: str


class PointRecord(Schema):
    """Record of what else the numbers of one point depend on.

    Attributes:
      fields: the method's fields and its share of bytes.
      files: SHA-256 of the plugins and the calibration that the method depends on, by name.
      versions: versions of the library and the packages that it computes with.
    """

    fields: dict[str, Any]
    files: dict[str, str]
    versions: dict[str, str]

    def changed_since(self, old: PointRecord) -> str:
        """Names the files and versions that differ from an earlier record; empty if none does."""
        changed = [f"{name} has changed" for name in _different(old.files, self.files)]
        versions = [
            f"{name} was {old.versions.get(name, 'absent')} and is {self.versions.get(name, 'absent')}"
            for name in _different(old.versions, self.versions)
        ]
        return ", ".join(changed + versions)


class _Header(Schema):
    description: Description
    points: dict[str, PointRecord]


class _Row(Schema):
    case: str
    point: str
    finite: bool
    nll: _Number
    full_nll: _Number
    kl_to_full: _Number
    top1_agreement: _Number
    exact_match: bool | None
    cache_bytes: _Bytes
    full_cache_bytes: _Bytes
    text: str = ""
    score: _Number = None
    heavy: Amount
    recent: Amount


class Store(NamedTuple):
    """An open sweep.

    Attributes:
      rows: the rows measured earlier.
      notes: sentences about rows that were dropped.
      append: writes a row, with its case and point, to the disk.
    """

    rows: Rows
    notes: list[str]
    append: Callable[[Mapping[str, Any]], None]


def check(directory: pathlib.Path) -> None:
    """Checks the files of a sweep, if `directory` has any, before the model and the cases are loaded.

    Raises the same errors as `opened`, except those that need the cases.
    """
    if directory.is_dir():
        with _locked(directory):
            _read(directory, None)


@contextlib.contextmanager
def opened(
    directory: pathlib.Path, description: Description, points: Mapping[str, PointRecord], cases: Collection[str]
) -> Iterator[Store]:
    """Starts a sweep in `directory`, or resumes the one there.

    Rows whose files or versions have changed are dropped, and so is an unfinished last line of a killed process.

    Args:
      directory: the sweep's directory.
      description: what the numbers of all points depend on.
      points: the points to measure now, by label.
      cases: the names of all cases.

    Raises:
      ValueError: the directory holds a different sweep, or a file that is damaged or not a sweep's. The message names
        the file and the line.
      BlockingIOError: another process has the sweep open.
    """
    with _locked(directory):
        old, measured, torn = _read(directory, cases)
        if different := old and _different(old.description.model_dump(), description.model_dump()):
            raise ValueError(f"{directory} holds another sweep: {', '.join(different)} differ; give another directory")
        known = old.points if old else {}
        reasons = {label: point.changed_since(known[label]) for label, point in points.items() if label in known}
        if other := [
            label for label, why in reasons.items() if not why and known[label].fields != points[label].fields
        ]:
            raise ValueError(f"{directory} holds another sweep: {', '.join(other)} differ; give another directory")
        kept = {key: row for key, row in measured.items() if not reasons.get(key[1])}
        if torn or len(kept) < len(measured):  # before the header, which records what they were measured with
            lines = (json.dumps({"case": case, "point": label, **row}) + "\n" for (case, label), row in kept.items())
            files.write_text(directory / _ROWS, "".join(lines))
        files.write_json(directory / _HEADER, _Header(description=description, points={**known, **points}).model_dump())
        notes = [
            f"{count} of {label} measured anew: {why}"
            for label, why in reasons.items()
            if why and (count := _count(sum(label == key[1] for key in measured)))
        ]
        if torn:
            notes.append(f"the last line of {directory / _ROWS} is not complete: its row is measured anew")
        with files.appending(directory / _ROWS) as append:
            yield Store(kept, notes, append)


def _named(case: str, point: str) -> str:
    return f"case {checks.shown(case)} of point {checks.shown(point)}"


def _count(rows: int) -> str:
    """Writes a number of rows in words; empty for 0."""
    return f"{rows} {'row' if rows == 1 else 'rows'}" if rows else ""


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _locked(directory: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return files.locked(directory, file=directory / ".lock")


def _read(directory: pathlib.Path, cases: Collection[str] | None) -> tuple[_Header | None, Rows, bytes]:
    """Reads the header, the rows and an unfinished last line; rows of other cases are refused if `cases` is given."""
    header, path = directory / _HEADER, directory / _ROWS
    if not header.is_file():
        if path.exists():
            raise ValueError(f"{path} is there without {header.name}: it is no sweep's; give another directory")
        return None, {}, b""
    known = validate(_Header, files.read_json(header), source=header)
    lines, torn = files.read_log(path) if path.is_file() else ([], b"")
    rows: Rows = {}
    for number, row in lines:
        source = f"{path}, line {number}"
        one = validate(_Row, row, source=source)
        key = (one.case, one.point)
        if one.point not in known.points or (cases is not None and one.case not in cases):
            raise ValueError(f"{source}: {_named(*key)} is not of this sweep")
        if key in rows:
            raise ValueError(f"{source}: {_named(*key)} is there twice")
        rows[key] = {name: value for name, value in row.items() if name not in ("case", "point")}
    return known, rows, torn
