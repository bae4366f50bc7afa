"""Compression methods: one file per paper, with its scorer, budget rule or quantizer and its named configurations.

All files of this directory are imported, and register what they define.
"""

import importlib
import pkgutil

from minikv_jax.methods import registry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
registry.seal()
