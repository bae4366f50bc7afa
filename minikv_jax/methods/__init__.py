"""Compression methods: one file a paper, with its scorer, budget rule or quantizer and its named configurations.

A file here is imported, and so registers what it defines, by being here.
"""

import importlib
import pkgutil

from minikv_jax.methods import registry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
registry.seal()
