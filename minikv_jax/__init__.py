"""KV-cache compression for JAX: MiniKV's 2-bit, layer-discriminative cache and related methods.

`__init__.pyi` lists the public names. Each is imported on first use, so importing the package does not import JAX.
"""

import ast
import importlib
import pathlib
import sys
import types
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, tuple[str, str]]:
    """Reads the module and the attribute behind every public name from the stub."""
    stub = ast.parse(pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


_PUBLIC = _public_names()


class _Package(types.ModuleType):
    """A package whose public names win over submodules of the same name, such as `generate` over `generate.py`."""

    def __getattr__(self, name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _PUBLIC[name]
        package = importlib.import_module(module)
        # A public name may be a module that its package has not imported yet.
        value = (
            getattr(package, attribute)
            if hasattr(package, attribute)
            else importlib.import_module(f"{module}.{attribute}")
        )
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # After importing a submodule, Python sets it as an attribute of its package.
        is_submodule = isinstance(value, types.ModuleType) and value.__name__ == f"{__name__}.{name}"
        if not (is_submodule and name in _PUBLIC):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_PUBLIC})


sys.modules[__name__].__class__ = _Package
