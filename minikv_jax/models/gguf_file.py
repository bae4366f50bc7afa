"""Reads GGUF files, llama.cpp's checkpoint format: the metadata, and the tensors row by row.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantises. Its reader is not
used, because it keeps an array object for every vocabulary entry and is slow to notice a truncated file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from pydantic import Field

from minikv_jax import checks, schemas

VERSIONS = (2, 3)
_MOST_ENTRIES = 1 << 16  # limit for metadata keys, and for tensors
_MOST_AXES = 4
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_Section = TypeVar("_Section", bound=schemas.Schema)


class _General(schemas.Schema, extra="ignore"):
    """Metadata needed to read any file."""

    alignment: Annotated[int, Field(ge=8, le=1 << 20)] = 32


class _Split(schemas.Schema, extra="ignore"):
    """Metadata of a model that is split over several files."""

    count: Annotated[int, Field(ge=0)] = 1


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Location of a tensor in its file. `shape` is in NumPy's order: `[out, in]` for a matrix."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows along the last axis; a vector is one row."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file with its header read and its tensor data memory-mapped.

    Attributes:
      path: the file.
      metadata: Python values by key.
      tensors: each tensor's location by name.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not GGUF, is truncated, or is one part of a split model. The message names it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        size = self.path.stat().st_size
        with self.path.open("rb") as stream, _naming_damage(self.path):
            self.metadata, directory = _read_header(stream, size)
            end = stream.tell()
        alignment = self.section(_General, "general").alignment
        with _naming_damage(self.path):
            self.tensors = _place_tensors(directory, end, alignment, size)
        if (parts := self.section(_Split, "split").count) > 1:
            raise ValueError(f"{self.path} is one part of {parts}: merge the parts first")
        self._bytes = np.memmap(self.path, np.uint8, "r")

    def section(self, schema: type[_Section], name: str) -> _Section:
        """Reads the metadata keys beginning with `name` and a dot. Raises ValueError naming a key that is not valid."""
        prefix = f"{name}."
        values = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        return schemas.validate(schema, values, source=self.path, within=name)

    def check_types(self) -> None:
        """Raises ValueError naming the tensors that the gguf package cannot dequantise."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        if unreadable := {kind for kind in kinds if not _can_dequantize(kind)}:
            names = [f"{name} ({at.kind.name})" for name, at in self.tensors.items() if at.kind in unreadable]
            raise ValueError(f"{self.path}: these tensors cannot be dequantised: {checks.listed(names)}")

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads a slice of a tensor's first axis, dequantised to float32."""
        tensor = self.tensors[name]
        vector, rows = len(tensor.shape) == 1, math.prod(tensor.shape[1:-1])
        first, last = (0, 1) if vector else (start * rows, stop * rows)
        begin, end = tensor.start + first * tensor.row_bytes, tensor.start + last * tensor.row_bytes
        raw = np.asarray(self._bytes[begin:end]).reshape(last - first, tensor.row_bytes)
        values = dequantize(raw, tensor.kind)
        return values.reshape(-1)[start:stop] if vector else values.reshape(stop - start, *tensor.shape[1:])


@contextlib.contextmanager
def _naming_damage(path: pathlib.Path) -> Iterator[None]:
    """Converts errors in reading a header to one ValueError that names the file."""
    try:
        yield
    except (EOFError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {checks.reason(error)}") from error


def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


_Entry = tuple[str, tuple[int, ...], GGMLQuantizationType, int]  # name, shape, type, offset


def _read_header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], list[_Entry]]:
    """Reads the metadata and the tensor directory. Raises EOFError or ValueError with the reason."""
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not start with 'GGUF'")
    version = _read_scalar(stream, "<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not one of {VERSIONS} (little-endian)")
    tensor_count, metadata_count = _read_scalar(stream, "<Q"), _read_scalar(stream, "<Q")
    if max(tensor_count, metadata_count) > _MOST_ENTRIES:
        raise ValueError(f"{tensor_count} tensors and {metadata_count} keys; accepted: at most {_MOST_ENTRIES} each")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = _read_string(stream, size)
        if key in metadata:
            raise ValueError(f"key {key} appears twice")
        metadata[key] = _read_value(stream, size)
    return metadata, [_read_tensor_entry(stream, size) for _ in range(tensor_count)]


def _place_tensors(directory: list[_Entry], end: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """Locates the tensors, which are stored in order. Raises EOFError or ValueError with the reason."""
    base = math.ceil(end / alignment) * alignment
    expected, tensors = 0, {}
    for name, shape, kind, offset in directory:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"tensor {name}: shape {shape} does not fill blocks of {block} ({kind.name})")
        if offset != expected:
            raise ValueError(
                f"tensor {name} begins at byte {offset} of the data; accepted: {expected}, behind the last"
            )
        tensor = GGUFTensor(kind, shape, base + offset, shape[-1] // block * block_bytes)
        nbytes = tensor.rows * tensor.row_bytes
        if tensor.start + nbytes > size:
            raise EOFError(f"it is truncated: tensor {name} ends at byte {tensor.start + nbytes} of {size}")
        if name in tensors:
            raise ValueError(f"tensor {name} appears twice")
        tensors[name] = tensor
        expected += math.ceil(nbytes / alignment) * alignment
    return tensors


def _read_tensor_entry(stream: BinaryIO, size: int) -> _Entry:
    name, axes = _read_string(stream, size), _read_scalar(stream, "<I")
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"tensor {name} has {axes} axes; accepted: 1 to {_MOST_AXES}")
    dims = [_read_scalar(stream, "<Q") for _ in range(axes)]
    kind = GGMLQuantizationType(_read_scalar(stream, "<I"))
    return name, tuple(reversed(dims)), kind, _read_scalar(stream, "<Q")


def _read_scalar(stream: BinaryIO, code: str) -> Any:
    data = stream.read(struct.calcsize(code))
    if len(data) < struct.calcsize(code):
        raise EOFError("it is truncated inside the header")
    return struct.unpack(code, data)[0]


def _read_string(stream: BinaryIO, size: int) -> str:
    length = _read_scalar(stream, "<Q")
    if length > size - stream.tell():
        raise EOFError("it is truncated inside the header")
    return stream.read(length).decode("utf-8")


def _read_value(stream: BinaryIO, size: int) -> Any:
    kind = GGUFValueType(_read_scalar(stream, "<I"))
    if kind == GGUFValueType.STRING:
        return _read_string(stream, size)
    if kind != GGUFValueType.ARRAY:
        return _read_scalar(stream, _SCALARS[kind])
    item, count = GGUFValueType(_read_scalar(stream, "<I")), _read_scalar(stream, "<Q")
    if item == GGUFValueType.ARRAY:
        raise ValueError("its metadata nests arrays, which is not supported")
    if item == GGUFValueType.STRING:
        return [_read_string(stream, size) for _ in range(count)]
    dtype = np.dtype(_SCALARS[item])  # in one call, because vocabularies have 10^5 entries
    if count * dtype.itemsize > size - stream.tell():
        raise EOFError("it is truncated inside the header")
    return np.frombuffer(stream.read(count * dtype.itemsize), dtype).tolist()
