"""`minikv inspect`: arguments, and what it writes. Importing this imports no JAX."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib

from minikv_jax.checks import at_least
from minikv_jax.cli import prompt
from minikv_jax.cli.evaluate import add_methods, add_model, load_model, make_methods, need_matplotlib


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
    from minikv_jax.evaluation.report import write_inspection
    from minikv_jax.evaluation.run import describe_model, method_record
    from minikv_jax.evaluation.tables import inspection_table
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
        memory.check_model(config, method.method)
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
    print(inspection_table(found, full_bytes).markdown())
    details = describe_model(model, arguments.model, arguments.implementation) | {
        "prompt_tokens": len(ids),
        "prompt_sha256": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "max_new_tokens": arguments.max_new_tokens,
        "methods": {name: method_record(config) for name, config in configs.items()},
    }
    for path in write_inspection(arguments.out, found, full_bytes, details):
        print(path)
    return 0
