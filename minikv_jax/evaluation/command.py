"""`minikv evaluate`: the tasks as a command. Prints a Markdown table of means and can write every window as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from typing import Any

from minikv_jax import presets
from minikv_jax.config import CacheConfig
from minikv_jax.evaluation.fidelity import Fidelity, book_windows, compare

_PACKAGES = ("jax", "jaxlib", "flax")


def parse_method(text: str) -> CacheConfig:
    """A method and changes to it: `h2o`, or `h2o:heavy=0.25,recent=0.25`.

    Raises:
      ValueError: an unknown method, field or value.
    """
    name, _, settings = text.partition(":")
    changes = {}
    for setting in filter(None, settings.split(",")):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"method {text!r}: expected NAME or NAME:KEY=VALUE,KEY=VALUE, got {setting!r}")
        changes[key] = value
    return presets.override(presets.get(name), changes)


def perplexity(arguments: argparse.Namespace) -> int:
    """Negative log-likelihood of a text's continuation, window by window, method by method."""
    from minikv_jax import hub

    methods = {text: parse_method(text) for text in arguments.method}
    text = arguments.text.read_text(encoding="utf-8")
    model, tokenizer = hub.load(arguments.model, dtype=arguments.dtype)
    if tokenizer is None:
        raise ValueError(f"model {arguments.model!r} has no tokenizer: perplexity of a text needs one")
    windows = book_windows(
        tokenizer.encode(text, add_special_tokens=False), arguments.context, arguments.continuation, arguments.limit
    )
    results = []
    for number, (prompt, continuation) in enumerate(windows):
        print(f"window {number + 1} of {len(windows)}", flush=True)
        results.append(compare(model, prompt, continuation, methods))
    print(_table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_record(arguments, methods, results), indent=2) + "\n", encoding="utf-8")
    return 0


def _table(results: Sequence[dict[str, Fidelity]]) -> str:
    rows = [
        "| method | NLL | perplexity change | KL to full | top-1 agreement | cache bytes | of full |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in results[0]:
        values = [window[name] for window in results]
        mean = {
            field.name: sum(getattr(value, field.name) for value in values) / len(values)
            for field in dataclasses.fields(Fidelity)
        }
        change = math.exp(mean["nll"] - mean["full_nll"]) - 1
        share = mean["cache_bytes"] / mean["full_cache_bytes"]
        rows.append(
            f"| {name} | {mean['nll']:.4f} | {change:+.1%} | {mean['kl_to_full']:.4f} | {mean['top1_agreement']:.3f} "
            f"| {mean['cache_bytes']:,.0f} | {share:.1%} |"
        )
    return "\n".join(rows)


def _record(
    arguments: argparse.Namespace, methods: dict[str, CacheConfig], results: Sequence[dict[str, Fidelity]]
) -> dict[str, Any]:
    return {
        "task": "perplexity",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "text": {"name": arguments.text.name, "sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest()},
        "context": arguments.context,
        "continuation": arguments.continuation,
        "methods": {name: dataclasses.asdict(config) for name, config in methods.items()},
        "windows": [{name: dataclasses.asdict(value) for name, value in window.items()} for window in results],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
