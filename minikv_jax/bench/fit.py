"""Finds the largest batch or the longest prompt within a memory limit, from the compiled programs' needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from minikv_jax.bench.end_to_end import Case, Programs
from minikv_jax.bench.random_models import first_layers
from minikv_jax.cache import memory
from minikv_jax.models.config import ModelConfig
from minikv_jax.prompts import bucket_length

FIELDS = {"batch": "batch", "prompt": "prompt_len"}  # sizes that can be found, and their fields in a case
# Depths of the models that are compiled to extrapolate a deeper one's needs. Not two layers, because XLA shares buffers
# differently there, by gigabytes if the prompt is long.
_DEPTHS = (4, 6)


def find(case: Case, what: str, limit: int) -> dict[str, Any]:
    """Finds the largest `what` ("batch" or "prompt") with which a case needs at most `limit` bytes (`needed_bytes`).

    Nothing is run. Prompts are tried at the lengths that `generate` pads to (`bucket_length`).

    Returns:
      The size, and the bytes of every size that was compiled.

    Raises:
      ValueError: not even the smallest size fits.
    """
    probes: dict[int, int] = {}

    def needed(size: int) -> int:
        probes[size] = needed_bytes(dataclasses.replace(case, **{FIELDS[what]: size}))
        return probes[size]

    sizes = _sizes(case, what, limit)
    index = largest(needed, sizes, limit)
    if index is None:
        smallest = probes[sizes[0]] if sizes else _weights_and_cache(case, case.config())
        raise ValueError(f"{case.method} needs {smallest / 1e9:.2f} GB at {what} 1, --memory-gb is {limit / 1e9:g}")
    return {"of": what, "size": sizes[index], "limit_bytes": limit, "compiled": probes}


def needed_bytes(case: Case) -> int:
    """Bytes that a case holds at once: weights, cache, and what the programs need besides.

    For a deep model, programs of four and of six layers are compiled, and what they need besides weights and cache is
    extrapolated linearly to the model's depth.
    """
    config = case.config()
    depth = config.num_hidden_layers
    if depth <= max(_DEPTHS):
        return Programs(case, config).needed_bytes
    few, more = (
        Programs(case, cut).needed_bytes - _weights_and_cache(case, cut)
        for cut in (first_layers(config, n) for n in _DEPTHS)
    )
    besides = few + (more - few) * (depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    return _weights_and_cache(case, config) + round(besides)


def largest(needed: Callable[[int], int], sizes: Sequence[int], limit: int) -> int | None:
    """Index of the last of ascending `sizes` that needs at most `limit`, or None.

    Needs grow almost linearly with the size, so each guess is where the line through the bracket meets the limit.
    """
    if not sizes or (low_bytes := needed(sizes[0])) > limit:
        return None
    low, high, high_bytes = 0, len(sizes), None
    while high - low > 1:
        if high_bytes is None:
            guess = high - 1
        else:
            share = (limit - low_bytes) / (high_bytes - low_bytes)
            size = sizes[low] + share * (sizes[high] - sizes[low])
            guess = min(max(sum(s <= size for s in sizes) - 1, low + 1), high - 1)
        guess_bytes = needed(sizes[guess])
        if guess_bytes <= limit:
            low, low_bytes = guess, guess_bytes
        else:
            high, high_bytes = guess, guess_bytes
    return low


def _sizes(case: Case, what: str, limit: int) -> list[int]:
    """All sizes whose weights and cache are within the limit."""
    sizes: list[int] = []
    size = 1 if what == "batch" else bucket_length(1)
    while True:
        tried = dataclasses.replace(case, **{FIELDS[what]: size})
        if _weights_and_cache(tried, tried.config()) > limit:
            return sizes
        sizes.append(size)
        size = size + 1 if what == "batch" else bucket_length(size + 1)


def _weights_and_cache(case: Case, config: ModelConfig) -> int:
    report = memory.report(
        config,
        case.resolve_method(),
        prompt_length=bucket_length(case.prompt_len),
        max_new_tokens=case.max_new_tokens,
        batch=case.batch,
        dtype=case.dtype,
    )
    return memory.weight_bytes(config, case.dtype) + report.bytes
