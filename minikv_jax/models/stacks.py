"""Reads checkpoints that store the matrices of all experts in one tensor, as if each expert had tensors of its own."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from minikv_jax.models.experts import Stack
from minikv_jax.models.tensors import TensorSource

_Read = Callable[[int, int], np.ndarray]  # rows from the first to before the last

# Values of the 4-bit floats of mxfp4, sign bit last (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unstack(source: TensorSource, stacks: Sequence[Stack]) -> TensorSource:
    """Returns the source with the tensors of single experts in place of those that `stacks` match."""
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, _Read] = {}

    @functools.lru_cache(maxsize=1)  # a matrix is read in pieces, one after the other
    def matrix(name: str, expert: int) -> np.ndarray:
        (own,) = source.read_rows(name, expert, expert + 1)
        return own

    for name, shape in source.shapes.items():
        found = ((stack, match) for stack in stacks if (match := re.fullmatch(stack.pattern, name)))
        stack, match = next(found, (None, None))
        if stack is None or match is None or len(shape) < 2 or shape[0] > 1 << 16:
            shapes[name] = shape
            readers[name] = functools.partial(source.read_rows, name)
            continue
        for part, part_shape, reader in _parts(shape, functools.partial(matrix, name), stack, match):
            shapes[part], readers[part] = part_shape, reader
    return dataclasses.replace(source, shapes=shapes, read_rows=lambda name, *rows: readers[name](*rows))


def _parts(
    stacked: tuple[int, ...], matrix: Callable[[int], np.ndarray], stack: Stack, match: re.Match[str]
) -> Iterator[tuple[str, tuple[int, ...], _Read]]:
    """Yields name, shape and reader of each part of each expert; `matrix` reads one expert of a `stacked` shape."""
    count, *shape = stacked
    rows, *columns = shape[::-1] if stack.transposed else shape
    names, step = stack.parts, len(stack.parts)
    size = rows // step

    def read(expert: int, number: int, start: int, stop: int) -> np.ndarray:
        own = matrix(expert).T if stack.transposed else matrix(expert)
        if stack.alternating:
            return own[number + step * start : number + step * stop : step]
        return own[number * size + start : number * size + stop]

    for expert in range(count):
        for number, part in enumerate(names):
            named = match.expand(part).format(expert=expert)
            yield named, (size, *columns), functools.partial(read, expert, number)


def from_mxfp4(
    shapes: Mapping[str, tuple[int, ...]], read_rows: Callable[[str, int, int], np.ndarray]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str, int, int], np.ndarray]]:
    """Replaces tensors in mxfp4, stored as NAME_blocks and NAME_scales, by NAME in float32.

    Args:
      shapes: shapes of the stored tensors. Blocks are uint8 `[E, out, G, 16]`, two numbers in a byte, and scales uint8
        `[E, out, G]`: exponents of two plus 127. The others are `[E, 32 G, out]`, as gpt-oss has them in bfloat16.
      read_rows: reads a slice of the first axis of a stored tensor.

    Returns:
      The shapes and the reader of all tensors.
    """
    packed = {name.removesuffix("_blocks") for name, shape in shapes.items() if _is_packed(name, shape, shapes)}
    blocks = {name: shapes[f"{name}_blocks"] for name in packed}
    stored = {f"{name}_{part}" for name in packed for part in ("blocks", "scales")}
    plain = {name: shape for name, shape in shapes.items() if name not in stored}

    def read(name: str, start: int, stop: int) -> np.ndarray:
        if name not in packed:
            return read_rows(name, start, stop)
        codes, scales = (read_rows(f"{name}_{part}", start, stop) for part in ("blocks", "scales"))
        pairs = np.stack([_FP4[codes & 15], _FP4[codes >> 4]], axis=-1)  # the low half comes first
        values = np.ldexp(pairs.reshape(*scales.shape, -1), scales[..., None].astype(np.int32) - 127)
        return values.reshape(*scales.shape[:-1], -1).swapaxes(1, 2)

    return plain | {name: (shape[0], 2 * math.prod(shape[2:]), shape[1]) for name, shape in blocks.items()}, read


def _is_packed(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    scales = shapes.get(f"{name.removesuffix('_blocks')}_scales")
    return name.endswith("_blocks") and len(shape) == 4 and shape[3] == 16 and scales == shape[:3]
