"""One task of a benchmark in a process of its own: its peak of memory is its own, and running out ends nothing else.

`run_task` starts it; `python -m minikv_jax.bench.worker MODULE FUNCTION ARGUMENTS OUT` is what it starts.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")  # XLA's, CUDA's and torch's words


class TaskError(RuntimeError):
    """What went wrong in a task, in one line."""


def run_task(module: str, function: str, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Calls `module.function(*arguments)` in a new process; arguments and result are JSON values.

    Raises:
      ValueError, NotImplementedError: as the function did.
      TaskError: it failed otherwise, out of memory included.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "result.json"
        command = [sys.executable, "-m", "minikv_jax.bench.worker", module, function, json.dumps(arguments), str(out)]
        done = subprocess.run(
            command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
        )
        if not out.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise TaskError(f"exit code {done.returncode}: {lines[-1]}")
        answer = json.loads(out.read_text())
    if "result" in answer:
        return answer["result"]
    kinds = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}
    raise kinds.get(answer["kind"], TaskError)(answer["error"])


def main(arguments: list[str]) -> None:
    """The new process: runs the task, writes its result or its error."""
    module, function, values, out = arguments
    try:
        answer = {"result": getattr(importlib.import_module(module), function)(*json.loads(values))}
    except Exception as error:  # whatever it is, the caller is told
        text = " ".join(str(error).split())
        if any(mark in text for mark in _OUT_OF_MEMORY):
            text = f"out of memory: {text[:200]}"
        answer = {"error": text or type(error).__name__, "kind": type(error).__name__}
    pathlib.Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
