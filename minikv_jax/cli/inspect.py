"""`minikv inspect`: arguments, and what it writes. Importing this imports no JAX."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minikv_jax.checks import at_least
from minikv_jax.cli import prompt
from minikv_jax.cli.evaluate import add_methods, add_model, load_model, make_methods, markdown, need_matplotlib

if TYPE_CHECKING:
    from minikv_jax.evaluation.inspection import Inspection


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Fills in `minikv inspect`."""
    parser.set_defaults(run=_inspect)
    add_model(parser)
    prompt.add_sources(parser.add_mutually_exclusive_group(required=True))
    prompt.add_template(parser)
    add_methods(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens after the prompt, whose attention is looked at; default: %(default)s",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="where pictures and page go")


def _inspect(arguments: argparse.Namespace) -> int:
    need_matplotlib()
    from minikv_jax.cache import memory
    from minikv_jax.evaluation.inspection import inspect
    from minikv_jax.evaluation.report import INSPECTION_COLUMNS, inspection_rows
    from minikv_jax.evaluation.run import describe_model
    from minikv_jax.generate import bucket_length
    from minikv_jax.methods import lookup as presets
    from minikv_jax.models import hub

    at_least(1, max_new_tokens=arguments.max_new_tokens)
    methods = make_methods(arguments)
    given = prompt.read(arguments)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise NotADirectoryError(f"--out {arguments.out} is a file: expected a directory")
    config = hub.load_config(arguments.model)
    for method in methods.values():
        memory.check_model(config, method.config)
    model, tokenizer = load_model(arguments)
    ids = prompt.encode(tokenizer, given, raw=arguments.no_chat_template)
    size = {
        "prompt_length": bucket_length(len(ids), config.max_position_embeddings),
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": model.dtype.name,
    }
    configs = {name: method.fit(config, **size) for name, method in methods.items()}
    found = inspect(model, ids, configs, arguments.max_new_tokens, arguments.implementation)
    full_bytes = memory.report(config, presets.get("full"), **size).bytes
    print(markdown(INSPECTION_COLUMNS, inspection_rows(found, full_bytes)))
    details = describe_model(model, arguments.model, arguments.implementation) | {
        "prompt_tokens": len(ids),
        "prompt_sha256": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "max_new_tokens": arguments.max_new_tokens,
        "methods": {name: dataclasses.asdict(config) for name, config in configs.items()},
    }
    for path in write_inspection(arguments.out, found, full_bytes, details):
        print(path)
    return 0


def write_inspection(
    directory: pathlib.Path, found: Mapping[str, Inspection], full_bytes: int, details: Mapping[str, Any]
) -> list[pathlib.Path]:
    """Writes a PNG file per picture, report.html and arrays.npz (`METHOD/FIELD` of `Inspection`); returns the paths."""
    import numpy as np

    from minikv_jax.evaluation import figures
    from minikv_jax.evaluation.report import inspection_report

    pictures = {
        "attention": ("Attention of the next tokens that falls on kept tokens", figures.attention_kept(found)),
        "budgets": ("Tokens held per layer", figures.budgets(found)),
    }
    if any(inspection.key_error is not None for inspection in found.values()):
        pictures["errors"] = ("Quantisation error per layer", figures.layer_errors(found))
    for name, inspection in found.items():
        file = re.sub(r"[^\w.,=-]+", "-", name)
        pictures[f"kept-{file}"] = (f"{name}: tokens kept per layer and head", figures.kept_map(inspection, name))
        if inspection.key_error is not None and inspection.packed_tokens.any():
            title = f"{name}: quantisation error per layer, head and channel"
            pictures[f"error-{file}"] = (title, figures.error_map(inspection, name))
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (_, image) in pictures.items():
        paths.append(directory / f"{name}.png")
        paths[-1].write_bytes(image)
    paths += [directory / "report.html", directory / "arrays.npz"]
    paths[-2].write_text(inspection_report(found, list(pictures.values()), full_bytes, details), encoding="utf-8")
    arrays = {
        f"{name}/{field}": value
        for name, inspection in found.items()
        for field, value in vars(inspection).items()
        if value is not None
    }
    np.savez_compressed(paths[-1], **arrays)
    return paths
