"""Reads checkpoint tensors block by block in the dtype and layout of the model's parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from minikv_jax.models.config import ModelConfig, Rope
from minikv_jax.models.rotary import channel_order

Bounds = tuple[tuple[int, int], ...]  # start and end on each axis of an array
_BLOCK_ELEMENTS = 1 << 22  # values converted at a time: 16 MB of float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule that maps tensor names to a parameter.

    Attributes:
      pattern: a regular expression that must match the whole name.
      path: the parameter's dotted path, with the groups of the match filled in. It may name a part of a joined
        projection (`projections.JOINED`) as if it were a parameter. A path that ends in "kernel" is transposed, because
        all formats store matrices `[out, in]`. None: the tensor is not needed.
    """

    pattern: str
    path: str | None


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The named tensors of a checkpoint.

    Attributes:
      origin: the file or directory, for error messages.
      shapes: every tensor's shape by name.
      read_rows: `read_rows(name, start, stop)` reads a slice of the first axis.
      rules: the first rule that matches a name applies.
      interleaved: attention turns neighbouring channels of queries and keys (`rotary.channel_order`).
      plus_one: the weights of norms are stored with one added.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read_rows: Callable[[str, int, int], np.ndarray]
    rules: tuple[Rule, ...]
    interleaved: bool = False
    plus_one: bool = False


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
          bounds: start and end on each of the parameter's axes. They do not split the heads of queries and keys.
        """
        transposed = path.endswith("kernel")  # files store matrices [out, in]
        one = np.float32(self.source.plus_one and path.endswith("norm.scale"))
        array = self._read(name, bounds[::-1] if transposed else bounds, np.dtype(np.float32) if one else self.dtype)
        if one:
            array = (array - one).astype(self.dtype)
        if re.search(r"self_attn\.[qk]_(proj|norm)\.", path):
            array = self._reorder(array, axis=0 if transposed else -1)
        return array.T if transposed else array

    def _reorder(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Puts the channels of each head on an axis in the order that `rotate` expects."""
        config = self.config
        rope = Rope(config.head_dim, config.rotary_dim or config.head_dim, config.rope_theta, None)
        order = channel_order(rope, interleaved=self.source.interleaved)
        if np.all(order[:-1] < order[1:]):
            return array
        heads = np.arange(0, array.shape[axis], config.head_dim)
        return array.take((heads[:, None] + order).reshape(-1), axis)

    def whole(self, name: str) -> np.ndarray:
        """Reads a whole tensor."""
        return self._read(name, tuple((0, size) for size in self.source.shapes[name]), self.dtype)

    def _read(self, name: str, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
        """Reads a block of a tensor a few rows at a time, so that only one copy of it exists."""
        (first, last), *others = bounds
        columns = tuple(slice(*at) for at in others)
        out = np.empty([stop - start for start, stop in bounds], dtype)
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
