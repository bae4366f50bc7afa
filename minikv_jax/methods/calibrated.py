"""Calibrations: ranges and rotations learned from a model's own keys and values, their files and quantizers.

`minikv_jax.calibrate` learns them. A calibration is saved as a directory, which can be used as a method: `--method DIR`
or `generate(..., method="DIR")`.
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

from minikv_jax import packing, saved_arrays
from minikv_jax.meshes import own_heads
from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.records import MethodRecord, Size, to_method
from minikv_jax.methods.registry import register_quantizer, to_dict
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import Packing, QuantizedArray
from minikv_jax.schemas import Schema

_KIND = "calibration"
_FITTED_SETTINGS = ("k_bits", "v_bits", "group_size")  # ranges are learned for these


class ModelSizes(Schema):
    """Sizes of a model that determine a calibration's shapes."""

    num_hidden_layers: Size
    num_key_value_heads: Size
    head_dim: Size


class CalibrationRecord(saved_arrays.Description):
    """Content of calibration.json."""

    method: MethodRecord
    model: ModelSizes
    details: dict[str, Any]


class Ranges(NamedTuple):
    """Scale factors for the lower and upper half of each group's range, measured from its midpoint.

    One factor per KV head and column of groups: `C = H` channels of keys, `C = H / g` groups of values.
    """

    low: Float[Array, "... K C"]
    high: Float[Array, "... K C"]


class OperandCalibration(NamedTuple):
    """Ranges and rotation of the keys or values of one layer, or, with a leading axis `L`, of all layers."""

    ranges: Ranges
    rotation: Float[Array, "... H H"]  # orthogonal: the cache holds `x @ rotation`


class Calibration(NamedTuple):
    """Everything learned for a method and a model: float32 arrays with a leading axis `L`."""

    keys: OperandCalibration
    values: OperandCalibration


def clipped(
    groups: Float[Array, "..."], ranges: Ranges, rule: Packing
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Computes each group's zero point and step after clipping its range (`packing.grouped`, leading axes `[B, K]`)."""
    low, step = packing.minmax(groups, rule)
    steps = (1 << rule.bits) - 1
    half = step * (steps / 2)
    below, above = (half * factor[:, None] for factor in ranges)  # [B, K, rows, C] by [K, 1, C]
    return low + half - below, (below + above) * (1 / steps)


@register_quantizer("calibrated-rotation")
class CalibratedRotation(MinMax):
    """Min/max quantisation of keys and values in a learned basis.

    Attributes:
      calibration: directory written by `minikv calibrate`.
    """

    by_layer: ClassVar[bool] = True

    calibration: str = ""

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del head_dim
        return jnp.asarray(self.learned(operand).rotation)

    def learned(self, operand: Operand) -> OperandCalibration:
        """Returns the ranges and rotation of one layer's keys or values."""
        return jax.tree.map(lambda leaf: leaf[operand.layer], getattr(load(self.calibration), operand.kind))

    def check(self, model: ModelConfig) -> None:
        if not self.calibration:
            raise ValueError("calibration='': expected a directory that `minikv calibrate` wrote")
        load(self.calibration)  # before anything is traced
        saved = _read(self.calibration)
        values = [(name, getattr(saved.quantizer, name), getattr(self, name)) for name in _FITTED_SETTINGS]
        values += [(name, getattr(saved.model, name), size) for name, size in model_sizes(model).items()]
        if different := [f"{name}={old}, here {new}" for name, old, new in values if old != new]:
            raise ValueError(f"the calibration {self.calibration} was learned for {'; '.join(different)}")


@register_quantizer("calibrated")
class Calibrated(CalibratedRotation):
    """Like `CalibratedRotation`, with learned clipping ranges. Only the "xla" implementation can pack it."""

    by_head: ClassVar[bool] = True

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        rule = self.packing(operand.kind)
        ranges = jax.tree.map(lambda of_heads: own_heads(of_heads, 0), self.learned(operand).ranges)
        return packing.encode(x, *clipped(packing.grouped(x, rule), ranges, rule), rule)


def model_sizes(model: ModelConfig) -> dict[str, int]:
    """Returns the sizes of a model that determine a calibration's shapes."""
    return {name: getattr(model, name) for name in ModelSizes.model_fields}


def save(
    calibration: Calibration,
    method: Method,
    model: ModelConfig,
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
) -> Method:
    """Saves a calibration in a new directory and returns the calibrated method.

    Args:
      calibration: the ranges and rotations.
      method: the method that the calibration was learned for.
      model: config of the model that it was learned for.
      path: the directory; must not exist.
      details: anything worth recording, as JSON values.

    Raises:
      FileExistsError: `path` exists already.
    """
    description = {"method": to_dict(method), "model": model_sizes(model), "details": details or {}}
    return saved_method(saved_arrays.save(path, calibration, description, kind=_KIND))


def is_calibration(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory with a saved calibration."""
    return saved_arrays.holds(path, _KIND)


def saved_method(path: str | os.PathLike[str]) -> Method:
    """Returns the method described by a saved calibration: the original method with the learned quantizer.

    If no ranges were learned, the quantizer is a `CalibratedRotation`, which kernels can pack as well.
    """
    directory = pathlib.Path(path).resolve()
    base, _, old, _ = _read(directory)
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
    """Reads a saved calibration. Raises FileNotFoundError if `path` holds none."""
    return _load(str(pathlib.Path(path).resolve()))


class _Saved(NamedTuple):
    """Description of a saved calibration."""

    method: Method
    model: ModelSizes
    quantizer: MinMax
    record: CalibrationRecord


def _read(path: str | os.PathLike[str]) -> _Saved:
    record = saved_arrays.read_description(path, _KIND, CalibrationRecord)
    source = os.path.join(path, f"{_KIND}.json")
    method = to_method(record.method, source)
    quantizer, dim = method.quantizer, record.model.head_dim
    if not isinstance(quantizer, MinMax):
        raise ValueError(f"{source}: method.quantizer is {quantizer}; accepted: minmax or hadamard")
    if dim % quantizer.group_size:
        raise ValueError(f"{source}: model.head_dim is {dim}; accepted: a multiple of {quantizer.group_size}")
    return _Saved(method, record.model, quantizer, record)


@functools.lru_cache(maxsize=8)
def _load(path: str) -> Calibration:
    saved = _read(path)
    sizes = saved.model
    blank = _blank(sizes.num_hidden_layers, sizes.num_key_value_heads, sizes.head_dim, saved.quantizer.group_size)
    calibration = saved_arrays.load(path, saved.record, blank)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(calibration)):
        raise ValueError(f"{path} holds a range or a rotation that is not finite")
    return calibration


def _blank(layers: int, heads: int, dim: int, group_size: int) -> Calibration:
    """Makes NumPy arrays of a calibration's shapes. Arrays restored into NumPy stay out of JAX's tracing."""

    def blank(*shape: int) -> Any:
        return np.broadcast_to(np.float32(0), shape)  # takes no memory, whatever sizes the file gives

    def operand(columns: int) -> OperandCalibration:
        ranges = blank(layers, heads, columns)
        return OperandCalibration(Ranges(ranges, ranges), blank(layers, dim, dim))

    return Calibration(operand(dim), operand(dim // group_size))
