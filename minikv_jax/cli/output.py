"""Output of the commands: rows, warnings, progress and JSON files."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minikv_jax import files


def print_rows(rows: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def span(values: Sequence[int]) -> str:
    """Formats the smallest and the largest value as `7-12`, or one number if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def write_json(path: pathlib.Path | None, values: Mapping[str, Any], indent: int = 2) -> None:
    """Writes the file of --json, if there is one."""
    if path is not None:
        files.write_json(path, values, indent)


def warn_not_finite(means: Mapping[str, Mapping[str, Any]]) -> None:
    """Names on stderr the methods that gave NaN or infinite logits or NaN scores, and in how many cases."""
    for name, values in means.items():
        if values["not_finite"]:
            print(
                f"minikv: {name}: NaN or infinite logits, or scores that are NaN, in {values['not_finite']} of "
                f"{values['cases']} cases; they are left out of the means",
                file=sys.stderr,
            )


def status(message: str) -> AbstractContextManager[Any]:
    """Shows a message on stderr while the block runs, if stderr is a terminal."""
    return Console(stderr=True).status(message)


class ProgressBar:
    """A progress bar on stderr, if stderr is a terminal."""

    def __init__(self, description: str, total: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(description, total=total)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance_to(self, done: int) -> None:
        """Shows that `done` of the total are done."""
        self._progress.update(self._task, completed=done)
