"""Reads checkpoint tensors block by block in the dtype and layout of the model's parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from minikv_jax.models.config import ModelConfig

Bounds = tuple[tuple[int, int], ...]  # start and end on each axis of an array
_BLOCK_ELEMENTS = 1 << 22  # values converted at a time: 16 MB of float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule that maps tensor names to a parameter.

    Attributes:
      pattern: a regular expression that must match the whole name.
      path: the parameter's dotted path, with the groups of the match filled in. It may name a part of a joined
        projection (`decoder.JOINED`) as if it were a parameter. A path that ends in "kernel" is transposed, because all
        formats store matrices `[out, in]`. None: the tensor is not needed.
      heads: the config field with the number of heads, if their channels are interleaved (`Family.gguf_interleaved`).
    """

    pattern: str
    path: str | None
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The named tensors of a checkpoint.

    Attributes:
      origin: the file or directory, for error messages.
      shapes: every tensor's shape by name.
      read_rows: `read_rows(name, start, stop)` reads a slice of the first axis.
      rules: the first rule that matches a name applies.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read_rows: Callable[[str, int, int], np.ndarray]
    rules: tuple[Rule, ...]


class TensorReader(NamedTuple):
    """Reads the tensors of a source, converted to `dtype`.

    Attributes:
      source: the tensors.
      config: the model's shape.
      dtype: dtype of the blocks.
      nonfinite: names of the tensors with NaN or infinite values after the conversion.
    """

    source: TensorSource
    config: ModelConfig
    dtype: np.dtype
    nonfinite: set[str]

    def block(self, name: str, rule: Rule, path: str, bounds: Bounds) -> np.ndarray:
        """Reads a block of the parameter at `path` from the tensor `name`.

        Args:
          name: the tensor.
          rule: the rule that maps `name` to `path`.
          path: the parameter.
          bounds: start and end on each of the parameter's axes. They do not split heads if the rule has `heads`.
        """
        transposed = path.endswith("kernel")  # files store matrices [out, in]
        array = self._read(name, bounds[::-1] if transposed else bounds)
        if rule.heads is not None:
            # Channel i of a head's first half lies next to channel i of its second half.
            pairs = array.reshape(-1, self.config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array.T if transposed else array

    def whole(self, name: str) -> np.ndarray:
        """Reads a whole tensor."""
        return self._read(name, tuple((0, size) for size in self.source.shapes[name]))

    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        """Reads a block of a tensor a few rows at a time, so that only one copy of it exists."""
        (first, last), *others = bounds
        columns = tuple(slice(*at) for at in others)
        out = np.empty([stop - start for start, stop in bounds], self.dtype)
        finite = True
        step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(self.source.shapes[name][1:])))
        for start in range(first, last, step):
            block = out[start - first : start - first + step]
            with np.errstate(over="ignore", invalid="ignore"):
                block[...] = self.source.read_rows(name, start, min(start + step, last))[:, *columns]
            finite = finite and _is_finite(block)
        if not finite:
            self.nonfinite.add(name)
        return out


def _is_finite(array: np.ndarray) -> bool:
    """Tells whether a contiguous array of floats has no NaN and no infinity.

    Read as integers, the bits of an infinity exceed those of every finite number of its sign, and the bits of a NaN
    exceed those of the infinity. A maximum over integers takes a fraction of the time of `isfinite`.
    """
    infinity = np.array(np.inf, array.dtype)
    return all(
        array.view(kind).max(initial=0) < sign.view(kind)
        for kind, sign in ((f"i{array.itemsize}", infinity), (f"u{array.itemsize}", -infinity))
    )
