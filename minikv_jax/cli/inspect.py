"""`minikv inspect`: show what methods keep of one prompt, layer by layer, with figures."""

from __future__ import annotations

import argparse
import hashlib
import json

from minikv_jax.cache import memory
from minikv_jax.checks import at_least
from minikv_jax.cli import prompt, shared
from minikv_jax.evaluation.inspection import inspect
from minikv_jax.evaluation.report import write_inspection
from minikv_jax.evaluation.run import describe_model, method_record
from minikv_jax.evaluation.tables import inspection_table
from minikv_jax.methods import lookup
from minikv_jax.prompts import bucket_length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prompt, the methods and where the files go."""
    shared.add_run(parser)
    prompt.add_sources(parser.add_mutually_exclusive_group(required=True))
    prompt.add_template(parser)
    shared.add_methods(parser)
    shared.add_max_new_tokens(parser, 32, text="tokens after the prompt, whose attention is inspected; ")
    shared.add_directory(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the methods side by side, and writes pictures, a page and arrays."""
    shared.need_matplotlib()
    at_least(1, max_new_tokens=arguments.max_new_tokens)
    methods = shared.read_methods(arguments)
    text_or_ids = prompt.read(arguments)
    model, tokenizer = shared.load_model(arguments, [method.method for method in methods.values()])
    ids = prompt.encode(tokenizer, text_or_ids, raw=arguments.no_chat_template)
    size = {
        "prompt_length": bucket_length(len(ids), model.config.max_position_embeddings),
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": model.dtype.name,
    }
    fitted = {name: method.fit(model.config, **size) for name, method in methods.items()}
    inspections = inspect(model, ids, fitted, arguments.max_new_tokens, arguments.implementation)
    full_bytes = memory.report(model.config, lookup.get("full"), **size).bytes
    print(inspection_table(inspections, full_bytes).markdown())
    details = describe_model(model, arguments.model, arguments.implementation) | {
        "prompt_tokens": len(ids),
        "prompt_sha256": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "max_new_tokens": arguments.max_new_tokens,
        "methods": {name: method_record(method) for name, method in fitted.items()},
    }
    for path in write_inspection(arguments.out, inspections, full_bytes, details):
        print(path)
    return 0
