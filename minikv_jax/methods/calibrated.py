"""Ranges and rotations learned from a model's own keys and values: the values, their files, and the quantizers.

`minikv_jax.calibrate` learns them. A saved calibration is a directory, and the directory is a method: `--method DIR`,
`generate(..., method="DIR")`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax import files, packing
from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import from_dict, register_quantizer, to_dict
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import Packing, QuantizedArray

_KIND = "calibration"
_SIZES = ("num_hidden_layers", "num_key_value_heads", "head_dim")
_FITTED_SETTINGS = ("k_bits", "v_bits", "group_size")  # what ranges are learned for


class Ranges(NamedTuple):
    """Scale factors for the lower and upper half of each group's range, measured from its midpoint.

    Shapes `[..., K, C]`: per KV head and column of groups, `C = H` channels of keys, `C = H / g` groups of values.
    """

    low: Float[Array, "... K C"]
    high: Float[Array, "... K C"]


class OperandCalibration(NamedTuple):
    """Ranges and rotation of one layer's keys or values; with a leading axis `L`, of all layers'."""

    ranges: Ranges
    rotation: Float[Array, "... H H"]  # orthogonal: the cache holds `x @ rotation`


class Calibration(NamedTuple):
    """Everything learned for a method and a model; float32, leading axis `L`."""

    keys: OperandCalibration
    values: OperandCalibration


def clipped(
    groups: Float[Array, "..."], ranges: Ranges, rule: Packing
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Zero point and step of each group (`packing.grouped`, leading axes `[B, K]`) after clipping its range."""
    low, step = packing.minmax(groups, rule)
    steps = (1 << rule.bits) - 1
    half = step * (steps / 2)
    below, above = (half * factor[:, None] for factor in ranges)  # [B, K, rows, C] by [K, 1, C]
    return low + half - below, (below + above) * (1 / steps)


@register_quantizer("calibrated-rotation")
class CalibratedRotation(MinMax):
    """Min/max of keys and values in a learned basis.

    Attributes:
      calibration: the directory that `minikv calibrate` wrote.
    """

    by_layer: ClassVar[bool] = True

    calibration: str = ""

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del head_dim
        return jnp.asarray(self.learned(operand).rotation)

    def learned(self, operand: Operand) -> OperandCalibration:
        """What was learned for one layer's keys or values."""
        return jax.tree.map(lambda leaf: leaf[operand.layer], getattr(load(self.calibration), operand.kind))

    def check(self, model: ModelConfig) -> None:
        if not self.calibration:
            raise ValueError("calibration='': expected a directory that `minikv calibrate` wrote")
        load(self.calibration)  # before anything is traced
        saved = files.read_description(self.calibration, _KIND)
        fitted = saved["method"]["quantizer"]
        values = [(name, fitted[name], getattr(self, name)) for name in _FITTED_SETTINGS]
        values += [(name, saved["model"][name], size) for name, size in model_sizes(model).items()]
        if different := [f"{name}={old}, here {new}" for name, old, new in values if old != new]:
            raise ValueError(f"the calibration {self.calibration} was learned for {'; '.join(different)}")


@register_quantizer("calibrated")
class Calibrated(CalibratedRotation):
    """Like `CalibratedRotation`, with learned clipping ranges. Only the "xla" implementation can pack it."""

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        rule = self.packing(operand.kind)
        return packing.encode(x, *clipped(packing.grouped(x, rule), self.learned(operand).ranges, rule), rule)


def model_sizes(model: ModelConfig) -> dict[str, int]:
    """The sizes that a calibration's shapes depend on."""
    return {name: getattr(model, name) for name in _SIZES}


def save(
    calibration: Calibration,
    method: Method,
    model: ModelConfig,
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
) -> Method:
    """Writes the new directory `path` and returns the method that it now is.

    Args:
      method: the method that the calibration was learned for.
      details: anything worth recording, as JSON values.

    Raises:
      FileExistsError: something is at `path` already.
    """
    description = {"method": to_dict(method), "model": model_sizes(model), "details": details or {}}
    return saved_method(files.save_arrays(path, calibration, description, kind=_KIND))


def is_calibration(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    return files.holds(path, _KIND)


def saved_method(path: str | os.PathLike[str]) -> Method:
    """Returns the method described by a saved calibration: the original method with the learned quantizer.

    If no ranges were learned, the quantizer is a `CalibratedRotation`, which kernels can pack too.
    """
    directory = pathlib.Path(path).resolve()
    base = from_dict(files.read_description(directory, _KIND)["method"])
    old = base.quantizer
    assert isinstance(old, MinMax)  # what `calibrate` accepts
    only_rotation = all(np.all(leaf == 1) for operand in load(directory) for leaf in operand.ranges)
    quantizer = (CalibratedRotation if only_rotation else Calibrated)(
        k_bits=old.k_bits,
        v_bits=old.v_bits,
        group_size=old.group_size,
        metadata_dtype=old.metadata_dtype,
        calibration=str(directory),
    )
    citation = f"{base.name}, calibrated: {base.citation}"
    return dataclasses.replace(base, name=directory.name, citation=citation, quantizer=quantizer)


def load(path: str | os.PathLike[str]) -> Calibration:
    """Reads what `save` wrote. Raises FileNotFoundError if `path` holds no calibration."""
    return _load(str(pathlib.Path(path).resolve()))


@functools.lru_cache(maxsize=8)
def _load(path: str) -> Calibration:
    saved = files.read_description(path, _KIND)
    layers, heads, dim = (saved["model"][name] for name in _SIZES)
    return files.load_arrays(path, _blank(layers, heads, dim, saved["method"]["quantizer"]["group_size"]))


def _blank(layers: int, heads: int, dim: int, group_size: int) -> Calibration:
    """NumPy arrays of a calibration's shapes: what is restored into NumPy stays out of JAX's tracing."""

    def operand(columns: int) -> OperandCalibration:
        ranges = jnp.zeros((layers, heads, columns))
        return OperandCalibration(Ranges(ranges, ranges), jnp.zeros((layers, dim, dim)))

    shapes = jax.eval_shape(lambda: Calibration(operand(dim), operand(dim // group_size)))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
