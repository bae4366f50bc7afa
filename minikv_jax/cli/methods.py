"""`minikv methods`: list the compression methods and their settings."""

from __future__ import annotations

import argparse
from typing import Any

from minikv_jax.cli import shared
from minikv_jax.methods import lookup
from minikv_jax.methods.base import settings
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import BUDGETS, QUANTIZERS, SCORERS, to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --plugin, whose methods are listed with the others."""
    shared.add_plugin(parser)
    shared.add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints every method with its source and what it changes, and all settings with their defaults."""
    shared.load_plugins(arguments)
    defaults = _settings(Method())
    for name in lookup.names():
        method = lookup.get(name)
        changed = {key: value for key, value in _settings(method).items() if value != defaults.get(key)}
        print(f"{name}\n    {method.citation}")
        if changed:
            print("    " + " ".join(f"{key}={_text(value)}" for key, value in changed.items()))
    print("\nSettings and their defaults, for --set:")
    for key, value in defaults.items():
        print(f"    {key}={_text(value)}")
    for registry in (SCORERS, BUDGETS, QUANTIZERS):
        print(f"\nValues of {registry.kind}, and their settings:")
        for name in registry:
            component = registry[name]
            values = settings(component) if isinstance(component, type) else {}
            print(" ".join(["   ", name, *(f"{key}={_text(value)}" for key, value in values.items())]))
    return 0


def _settings(method: Method) -> dict[str, Any]:
    """A method's settings by the keys of --set, without its name and citation."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(method).items():
        if isinstance(value, dict):
            flat |= {key: value["name"]} if "name" in value else {}
            flat |= {f"{key}.{setting}": item for setting, item in value.items() if setting != "name"}
        elif key not in ("name", "citation"):
            flat[key] = value
    return flat


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
