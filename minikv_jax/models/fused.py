"""Tensors of a checkpoint that hold several projections, presented as tensors of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from minikv_jax.models.tensors import TensorSource

Parts = dict[str, int]  # names and rows of the parts of a fused tensor, in order


def split_fused(source: TensorSource, fused: Mapping[str, Parts]) -> TensorSource:
    """Presents the parts of `fused` tensors as tensors of their own.

    Raises:
      ValueError: a fused tensor has another number of rows than its parts.
    """
    shapes, places = dict(source.shapes), {}
    for whole, parts in fused.items():
        rows, *others = shapes.pop(whole)
        if rows != sum(parts.values()):
            raise ValueError(f"{source.origin}: {whole} has {rows} rows, the config needs {sum(parts.values())}")
        start = 0
        for name, count in parts.items():
            shapes[name] = (count, *others)
            places[name] = (whole, start)
            start += count

    def read_rows(name: str, start: int, stop: int) -> np.ndarray:
        whole, first = places.get(name, (name, 0))
        return source.read_rows(whole, first + start, first + stop)

    return dataclasses.replace(source, shapes=shapes, read_rows=read_rows)
