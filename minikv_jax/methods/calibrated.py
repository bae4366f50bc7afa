"""Ranges and rotations learnt from a model's own keys and values: what they are, their file, and the quantiser.

`minikv_jax.calibrate` learns them. A saved calibration is a directory, and the directory a method:
`--method DIR`, `generate(..., cache="DIR")`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Float

from minikv_jax import packing as quantization
from minikv_jax.methods.base import Operand, register_quantizer
from minikv_jax.methods.config import CacheConfig
from minikv_jax.methods.quantizers import MinMax, minmax_arguments
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import QuantizedArray

_DESCRIPTION = "calibration.json"
_ARRAYS = "arrays"
_SIZES = ("num_hidden_layers", "num_key_value_heads", "head_dim")
_FITTED = ("k_bits", "v_bits", "group_size")  # what ranges are learnt for


class Ranges(NamedTuple):
    """By what the two halves of a group's range, from its middle to its least and largest value, are multiplied.

    Shapes `[..., K, C]`: per KV head and column of groups, `C = H` channels of keys, `C = H / g` groups of values.
    """

    low: Float[Array, "... K C"]
    high: Float[Array, "... K C"]


class OperandCalibration(NamedTuple):
    """What is learnt for the keys, or the values, of one layer; with a leading axis `L`, of all layers."""

    ranges: Ranges
    rotation: Float[Array, "... H H"]  # orthogonal: the cache holds `x @ rotation`


class Calibration(NamedTuple):
    """What is learnt for a method and a model. float32, leading axis `L`."""

    keys: OperandCalibration
    values: OperandCalibration


def clipped(
    groups: Float[Array, "..."], ranges: Ranges, bits: int, axis: quantization.Axis
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Zero and step of groups (`quantization.grouped`, leading axes `[B, K]`) of whose ranges a part is used."""
    low, step = quantization.minmax(groups, bits, axis)
    steps = (1 << bits) - 1
    half = step * (steps / 2)
    below, above = (half * factor[:, None] for factor in ranges)  # [B, K, rows, C] by [K, 1, C]
    return low + half - below, (below + above) * (1 / steps)


@register_quantizer("calibrated-rotation", calibration="")
class CalibratedRotation(MinMax):
    """Min/max of keys and values in a learnt basis: `minikv calibrate`. `calibration` is the directory."""

    by_layer = True

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del head_dim
        return jnp.asarray(_learnt(operand).rotation)

    def check(self, config: CacheConfig, model: ModelConfig) -> None:
        path = config.option("calibration")
        if not path:
            raise ValueError(
                f"quantizer={config.quantizer!r} needs calibration=DIR, a directory that `minikv calibrate` wrote"
            )
        load(path)  # before anything is traced
        saved = _read(path)
        values = [(name, saved["method"][name], getattr(config, name)) for name in _FITTED]
        values += [(name, saved["model"][name], size) for name, size in model_sizes(model).items()]
        if different := [f"{name}={old}, here {new}" for name, old, new in values if old != new]:
            raise ValueError(f"the calibration {path} was learnt for {'; '.join(different)}")


@register_quantizer("calibrated", calibration="")
class Calibrated(CalibratedRotation):
    """The same, of whose ranges a learnt part is used; "xla" alone packs it."""

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        arguments = minmax_arguments(operand)
        bits, axis = arguments["bits"], arguments["axis"]
        groups = quantization.grouped(x, arguments["group_size"], axis)
        return quantization.encode(x, *clipped(groups, _learnt(operand).ranges, bits, axis), **arguments)


def model_sizes(model: ModelConfig) -> dict[str, int]:
    """What a calibration's shapes are made of."""
    return {name: getattr(model, name) for name in _SIZES}


def save(
    calibration: Calibration,
    config: CacheConfig,
    model: ModelConfig,
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
) -> CacheConfig:
    """Writes the new directory `path` and returns the method that it now is.

    Args:
      config: the method that it was learnt for.
      details: whatever is worth recording, as JSON.

    Raises:
      FileExistsError: there is something at `path` already.
    """
    directory = pathlib.Path(path).resolve()
    if directory.exists():
        raise FileExistsError(f"{directory} exists: a calibration is saved into a new directory")
    directory.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _ARRAYS, _leaves(calibration))
    description = {"method": dataclasses.asdict(config), "model": model_sizes(model), "details": details or {}}
    (directory / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return method(path)


def is_calibration(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    return (pathlib.Path(path) / _DESCRIPTION).is_file()


def method(path: str | os.PathLike[str]) -> CacheConfig:
    """The method that a saved calibration is: the one it was learnt for, stored as was learnt.

    Where no ranges were learnt its quantiser is "calibrated-rotation", which kernels pack too.
    """
    directory = pathlib.Path(path).resolve()
    base = CacheConfig(**_read(directory)["method"])
    whole = all(np.all(leaf == 1) for part in load(directory) for leaf in part.ranges)
    return dataclasses.replace(
        base,
        name=directory.name,
        citation=f"{base.name}, calibrated: {base.citation}",
        quantizer="calibrated-rotation" if whole else "calibrated",
        options=dict(base.options) | {"calibration": str(directory)},
    )


def load(path: str | os.PathLike[str]) -> Calibration:
    """Reads what `save` wrote. Raises FileNotFoundError where `path` holds no calibration."""
    return _load(str(pathlib.Path(path).resolve()))


@functools.lru_cache(maxsize=8)
def _load(path: str) -> Calibration:
    saved = _read(path)
    layers, heads, dim = (saved["model"][name] for name in _SIZES)
    blank = _blank(layers, heads, dim, saved["method"]["group_size"])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(pathlib.Path(path) / _ARRAYS, _leaves(blank))
    leaves, structure = jax.tree.flatten(blank)
    return jax.tree.unflatten(structure, [stored[f"{index:02d}"] for index in range(len(leaves))])


def _blank(layers: int, heads: int, dim: int, group_size: int) -> Calibration:
    """NumPy arrays of a calibration's shapes: what is restored into NumPy stays out of JAX's tracing."""

    def operand(columns: int) -> OperandCalibration:
        ranges = jnp.zeros((layers, heads, columns))
        return OperandCalibration(Ranges(ranges, ranges), jnp.zeros((layers, dim, dim)))

    shapes = jax.eval_shape(lambda: Calibration(operand(dim), operand(dim // group_size)))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _leaves(calibration: Calibration) -> dict[str, Array]:
    return {f"{index:02d}": leaf for index, leaf in enumerate(jax.tree.leaves(calibration))}


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not is_calibration(path):
        raise FileNotFoundError(f"{os.fspath(path)} holds no calibration: {_DESCRIPTION} is missing")
    return json.loads((pathlib.Path(path) / _DESCRIPTION).read_text(encoding="utf-8"))


def _learnt(operand: Operand) -> OperandCalibration:
    """What was learnt for one layer's keys or values."""
    calibration = load(operand.config.option("calibration"))
    return jax.tree.map(lambda leaf: leaf[operand.layer], getattr(calibration, operand.kind))
