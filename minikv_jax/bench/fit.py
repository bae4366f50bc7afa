"""The largest batch, or the longest prompt, that a memory limit holds: by what the compiled programs say they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from minikv_jax import memory, presets
from minikv_jax.bench.end_to_end import Case, Programs
from minikv_jax.generate import bucket_length

FIND = ("batch", "prompt")


def find(case: Case, what: str, limit: int) -> dict[str, Any]:
    """The largest `what` ("batch" or "prompt") of a case whose programs need at most `limit` bytes.

    Nothing is run. Prompts are tried at the lengths that `generate` pads to (`bucket_length`).

    Returns:
      The size found, and the bytes of every size that was compiled.

    Raises:
      ValueError: not even the smallest size fits.
    """
    field = {"batch": "batch", "prompt": "prompt_len"}[what]
    probes: dict[int, int] = {}

    def needed(size: int) -> int:
        probes[size] = Programs(dataclasses.replace(case, **{field: size})).needed_bytes
        return probes[size]

    sizes = _sizes(case, what, limit)
    index = largest(needed, sizes, limit)
    if index is None:
        least = f"{probes[sizes[0]] / 1e9:.2f} GB" if sizes else f"{_weights(case) / 1e9:.2f} GB of weights alone"
        raise ValueError(f"{case.method} needs {least} at {what} 1: more than --memory-gb {limit / 1e9:g}")
    return {"of": what, "size": sizes[index], "limit_bytes": limit, "compiled": probes}


def largest(needed: Callable[[int], int], sizes: Sequence[int], limit: int) -> int | None:
    """Index of the last of ascending `sizes` that needs at most `limit`, or None.

    Needs grow with the size, nearly along a line, so each guess is where the line through the bracket meets the limit.
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
        found = needed(sizes[guess])
        if found <= limit:
            low, low_bytes = guess, found
        else:
            high, high_bytes = guess, found
    return low


def _sizes(case: Case, what: str, limit: int) -> list[int]:
    """Sizes to choose from: those whose weights and cache alone are within the limit."""
    model, method = case.config(), presets.get(case.method)

    def fits(batch: int, prompt: int) -> bool:
        sizes = {"prompt_length": prompt, "max_new_tokens": case.max_new_tokens, "batch": batch}
        return _weights(case) + memory.report(model, method, dtype=case.dtype, **sizes).bytes <= limit

    found: list[int] = []
    size = 1 if what == "batch" else bucket_length(1)
    while fits(*((size, case.prompt_len) if what == "batch" else (case.batch, size))):
        found.append(size)
        size = size + 1 if what == "batch" else bucket_length(size + 1)
    return found


def _weights(case: Case) -> int:
    return memory.weight_bytes(case.config(), case.dtype)
