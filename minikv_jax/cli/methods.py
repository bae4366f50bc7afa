"""`minikv methods`: list the compression methods and their settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from minikv_jax.cli import shared
from minikv_jax.methods import base as schemes
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --plugin, whose methods are listed with the others."""
    shared.add_plugin(parser)
    shared.add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints every method with its source and what it changes, and all settings with their defaults."""
    shared.load_plugins(arguments)
    defaults = _settings(CacheConfig())
    for name in presets.names():
        method = presets.get(name)
        changed = {key: value for key, value in _settings(method).items() if value != defaults.get(key)}
        print(f"{name}\n    {method.citation}")
        if changed:
            print("    " + " ".join(f"{key}={value}" for key, value in changed.items()))
    print("\nFields and their defaults, for --set:")
    for key, value in defaults.items():
        print(f"    {key}={str(value).lower() if value is None else value}")
    for registry in (schemes.SCORERS, schemes.BUDGETS, schemes.QUANTIZERS):
        print(f"\nValues of {registry.kind}, and what --set can change besides:")
        for name in registry:
            print(" ".join(["   ", name, *(f"{key}={value}" for key, value in registry[name].options.items())]))
    return 0


def _settings(method: CacheConfig) -> dict[str, Any]:
    """A method's fields and options, without its name and citation."""
    values = dataclasses.asdict(method) | dict(method.options)
    return {key: value for key, value in values.items() if key not in ("name", "citation", "options")}
