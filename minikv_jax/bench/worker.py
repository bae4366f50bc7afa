"""Runs one benchmark task in its own process, which isolates its peak memory and its failures.

`run_task` starts `python -m minikv_jax.bench.worker MODULE FUNCTION ARGUMENTS OUT`.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from minikv_jax import files

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")  # XLA's, CUDA's and torch's words


class TaskError(RuntimeError):
    """A task that failed; the message is one line."""


FAILURES = (TaskError, ValueError, NotImplementedError)  # what `run_task` raises


def run_task(
    function: Callable[..., Any],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    seconds: float | None = None,
) -> Any:
    """Calls `function(*arguments)` in a new process; arguments and result are JSON values.

    Args:
      function: of a module that the process can import.
      environment: variables that change.
      seconds: the process is stopped after so long.

    Raises:
      ValueError, NotImplementedError: if the function does.
      TaskError: it fails otherwise, also by running out of memory or of time.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "result.json"
        name = [function.__module__, function.__qualname__]
        command = [sys.executable, "-m", "minikv_jax.bench.worker", *name, json.dumps(arguments), str(out)]
        how: dict[str, Any] = {"env": os.environ | (environment or {}), "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, check=False, timeout=seconds, **how)
        except subprocess.TimeoutExpired as error:
            raise TaskError(f"stopped after {seconds:.0f} s") from error
        if not out.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise TaskError(f"exit code {done.returncode}: {lines[-1]}")
        answer = files.read_json(out)
    if "result" in answer:
        return answer["result"]
    kinds = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}
    raise kinds.get(answer["kind"], TaskError)(answer["error"])


def reason(error: Exception) -> str:
    """An error as one line of text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"out of memory: {text[:200]}" if any(mark in text for mark in _OUT_OF_MEMORY) else text


def serve(arguments: list[str]) -> None:
    """Runs the task in the new process, and writes its result or its error."""
    module, function, values, out = arguments
    try:
        answer = {"result": getattr(importlib.import_module(module), function)(*json.loads(values))}
    except Exception as error:  # the caller handles every error
        answer = {"error": reason(error), "kind": type(error).__name__}
    files.write_json(out, answer)


if __name__ == "__main__":
    serve(sys.argv[1:])
