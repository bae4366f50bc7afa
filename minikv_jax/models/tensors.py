"""Reads the tensors of a checkpoint as parameters of the model: block by block, in the model's dtype and layout."""

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
    """Maps the tensors whose names match `pattern` in full to the parameter at `path`.

    Attributes:
      pattern: a regular expression.
      path: the parameter, with the groups of the match filled in. It may name a part of a joined projection
        (`decoder.JOINED`) as if it were a parameter. All formats store matrices `[out, in]`: a path that ends in
        "kernel" is transposed. None: the tensor is not needed.
      heads: the config field with the number of heads whose channels are interleaved (`Family.gguf_interleaved`).
    """

    pattern: str
    path: str | None
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The named tensors of a checkpoint.

    Attributes:
      origin: the file or directory, for errors.
      shapes: of every tensor.
      read_rows: `read_rows(name, start, stop)` slices the first axis.
      rules: the first one that matches a name is used.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read_rows: Callable[[str, int, int], np.ndarray]
    rules: tuple[Rule, ...]


class TensorReader(NamedTuple):
    """Reads tensors in `dtype`.

    Attributes:
      nonfinite: names of the tensors in which NaN or infinite values were found, be it from the conversion.
    """

    source: TensorSource
    config: ModelConfig
    dtype: np.dtype
    nonfinite: set[str]

    def block(self, name: str, rule: Rule, path: str, bounds: Bounds) -> np.ndarray:
        """A block of the parameter at `path`, which is filled by the tensor `name`.

        Args:
          bounds: on the parameter's axes; they lie between heads if the rule tells heads apart.
        """
        transposed = path.endswith("kernel")  # files store matrices [out, in]
        array = self._read(name, bounds[::-1] if transposed else bounds)
        if rule.heads is not None:
            # Channel i of a head's first half lies next to channel i of its second half.
            pairs = array.reshape(-1, self.config.head_dim // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array.T if transposed else array

    def whole(self, name: str) -> np.ndarray:
        """All of a tensor."""
        return self._read(name, tuple((0, size) for size in self.source.shapes[name]))

    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        """A block of a tensor, converted a few rows at a time so that only one copy of it exists."""
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
    """Whether a contiguous array of floats holds no NaN and no infinity.

    An infinity's bits, as an integer, are above those of every finite number of its sign, and a NaN's above them. The
    largest integers take a fraction of the time of `isfinite`, and of NumPy's float arithmetic in 16 bits.
    """
    infinity = np.array(np.inf, array.dtype)
    return all(
        array.view(kind).max(initial=0) < sign.view(kind)
        for kind, sign in ((f"i{array.itemsize}", infinity), (f"u{array.itemsize}", -infinity))
    )
