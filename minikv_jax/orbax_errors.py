"""Orbax's errors in one line. By itself it reports them on stderr too, from its threads, in up to forty lines each."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from minikv_jax import checks

_CAUSE_LENGTH = 200
_KNOWN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def naming_damage(path: pathlib.Path, kind: str) -> Iterator[None]:
    """Turns Orbax's errors for damaged files into a ValueError of one line that names the path."""
    try:
        with _finishing_first(), _quiet():
            yield
    except Exception as error:  # Orbax raises bare exceptions, with TensorStore's error as their cause
        raise ValueError(f"{path} is not a complete {kind}: {_cause(error.__cause__ or error)}") from None


@contextlib.contextmanager
def naming_failure() -> Iterator[None]:
    """Turns Orbax's errors for files that it cannot write into an OSError of one line; `replacing` adds the path."""
    try:
        with _finishing_first(), _quiet():
            yield
    except Exception as error:  # TensorStore raises several kinds
        text = f"{error} {error.__cause__}"
        number = next((number for number in _KNOWN if os.strerror(number) in text), errno.EIO)
        raise OSError(number, _cause(error) if number == errno.EIO else os.strerror(number)) from None


@contextlib.contextmanager
def _finishing_first() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, because Orbax's threads hang or report at length if they are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax reports on stderr, because the caller is told. After a failure its threads stay quiet."""
    before, records, logger = sys.unraisablehook, _Records(), logging.getLogger("absl")
    if not isinstance(before, _LateReports):
        sys.unraisablehook = _LateReports(before)
    logger.addFilter(records)
    try:
        yield
    except BaseException:
        records.leave()
        warnings.filterwarnings("ignore", "coroutine '_read_array", RuntimeWarning)
        logging.getLogger("asyncio").addFilter(_is_no_late_report)
        raise
    sys.unraisablehook = before
    logger.removeFilter(records)


# Orbax reads and writes all arrays at once and closes the event loop at the first failure. The others then report their
# own failures: as unraisable exceptions, log records and warnings.
_LATE = re.compile("Event loop is closed|Encountered error while reading array|coroutine '_read_array|tensorstore_spec")


class _LateReports:
    """Drops reports of reads and writes that end after another one has failed. Passes others to the previous hook."""

    def __init__(self, before: Callable[[sys.UnraisableHookArgs], Any]):
        self._before = before

    def __call__(self, report: sys.UnraisableHookArgs) -> None:
        if not _LATE.search(str(report.exc_value)):
            self._before(report)


def _is_no_late_report(record: logging.LogRecord) -> bool:
    return not _LATE.search(record.getMessage())


class _Records(logging.Filter):
    """Drops all records until `leave`, and from then on those of the threads that were started since the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self._threads = set(threading.enumerate())
        self._left: set[int | None] | None = None

    def leave(self) -> None:
        self._left = {thread.ident for thread in set(threading.enumerate()) - self._threads}

    def filter(self, record: logging.LogRecord) -> bool:
        return self._left is not None and record.thread not in self._left


def _cause(error: BaseException) -> str:
    """Cuts TensorStore's settings and source lines from an error's text."""
    return re.split(r" \[(?:tensorstore_spec|source locations)", checks.reason(error))[0][:_CAUSE_LENGTH]
