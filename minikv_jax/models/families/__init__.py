"""Registry of model families. Every file in this package defines one as `FAMILY`; a new family is a new file."""

import importlib
import pkgutil
from typing import Any

from minikv_jax import checks
from minikv_jax.models.family import Family


def discover() -> dict[str, Family]:
    """Imports every file of this package and returns the families by `model_type`."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


FAMILIES = discover()


def get(model_type: Any) -> Family:
    """Returns the family of a Hugging Face `model_type`. Raises ValueError naming the known ones."""
    checks.choice("model_type", model_type, tuple(FAMILIES))
    return FAMILIES[model_type]
