"""Which keys a layer's queries see: all earlier ones, those of a sliding window, or those of their own chunk."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from minikv_jax import checks


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Attention by chunks (Llama 4): query `t` sees the keys `t // size * size <= s <= t`.

    Attributes:
      size: tokens of a chunk.
    """

    size: int


# Tokens of a sliding window, in which query `t` sees the keys `t - window < s <= t`, or a chunk.
Window: TypeAlias = int | Chunk


def size(window: Window) -> int:
    """Most keys that a query sees, itself included."""
    return window.size if isinstance(window, Chunk) else window


def oldest(window: Window, position: Any) -> Any:
    """Position of the oldest key that a query at `position` sees; below 0 if it sees all."""
    return position // window.size * window.size if isinstance(window, Chunk) else position - window + 1


def check(window: Window | None) -> None:
    """Raises ValueError unless a window, or a chunk, has at least one token."""
    checks.at_least(1, window=None if window is None else size(window))


def for_kernels(window: Window | None) -> int | None:
    """Returns the sliding window for a kernel. Raises NotImplementedError for a chunk, which none supports."""
    if isinstance(window, Chunk):
        raise NotImplementedError(f"window={window}: the kernels support sliding windows only")
    return window
