"""Plugins: Python files of a user that register components and methods."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types

from minikv_jax.methods.calls import cause
from minikv_jax.methods.registry import REGISTRIES


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Runs the current text of a file. Stored bytecode may hide an edit made within the same second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_plugin(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Runs a Python file that registers components or methods.

    Args:
      path: the file.

    Returns:
      The new names, as a tuple for each kind that has some ("scorer", "budget", "quantizer" or "method").

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the file registers nothing, or fails; the text gives the line and the cause, and nothing of the file
        stays registered.
    """
    file = pathlib.Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"plugin {os.fspath(path)} does not exist")
    before = [registry.snapshot() for registry in REGISTRIES]
    name = f"minikv_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_SourceLoader(name, str(file)))
    if spec is None or spec.loader is None or file.suffix != ".py":
        raise ValueError(f"plugin {os.fspath(path)} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # whatever a user's file may raise, and Ctrl-C
        del sys.modules[spec.name]
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.restore(entries)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ValueError(f"plugin {os.fspath(path)}{cause(error, str(file))}") from error
    new = {
        registry.kind: names
        for registry, old in zip(REGISTRIES, before, strict=True)
        if (names := tuple(name for name, entry in registry.snapshot().items() if entry is not old.get(name)))
    }
    if not new:
        raise ValueError(f"plugin {os.fspath(path)} registers nothing: no scorer, budget, quantizer or method")
    return new
