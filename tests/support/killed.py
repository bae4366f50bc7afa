"""Runs processes that write, and kills them at random moments.

The processes are forked from one that has imported everything and started none of JAX's threads, so that a kill takes
a fraction of a second.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest import mock

warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")  # in the process that forks

_CONTEXT = multiprocessing.get_context("forkserver")

# Called with a connection and arguments; sends None at its start, and then a report per piece.
Target = Callable[..., None]


@functools.cache
def _compiled() -> str:
    """Directory for compiled programs, which all processes share."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _start(target: Target, arguments: tuple[Any, ...]) -> tuple[ForkServerProcess, Connection]:
    """Starts a process and returns once `target` begins."""
    _CONTEXT.set_forkserver_preload(["support.writers"])
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),  # the forking process finds its imports by it
        "JAX_COMPILATION_CACHE_DIR": _compiled(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(target, theirs, *arguments))
    process.start()
    theirs.close()
    ours.recv()
    return process, ours


def _run(target: Target, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    target(*arguments)


def kill(target: Target, arguments: tuple[Any, ...], after: float, by: signal.Signals = signal.SIGKILL) -> list[Any]:
    """Kills a process that runs `target` after some seconds of work, and returns its reports."""
    process, ours = _start(target, arguments)
    reports = []
    deadline = time.perf_counter() + after
    while (left := deadline - time.perf_counter()) > 0 and ours.poll(left):
        reports += _received(ours)
    assert process.pid is not None
    while process.exitcode is None:  # an interrupt is lost if it comes within Python's garbage collection
        os.kill(process.pid, by)
        process.join(2)
    while ours.poll() and (last := _received(ours)):
        reports += last
    ours.close()
    return reports


def _received(connection: Connection) -> list[Any]:
    try:
        return [connection.recv()]
    except EOFError:
        return []


def duration(target: Target, arguments: tuple[Any, ...]) -> float:
    """Measures the seconds from the beginning of `target` to its first report."""
    process, ours = _start(target, arguments)
    began = time.perf_counter()
    ours.recv()
    took = time.perf_counter() - began
    process.kill()
    process.join()
    ours.close()
    return took


def moments(count: int, longest: float, seed: int = 0) -> Iterator[float]:
    """Draws random moments up to `longest` seconds, one from each of `count` equal intervals."""
    generator = random.Random(seed)
    for number in range(count):
        yield longest * (number + generator.random()) / count
