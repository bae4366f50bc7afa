"""GGUF files (llama.cpp's checkpoint format): metadata, tensors row by row, and the model they hold.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantises. Its reader is not
used, because it keeps an array object for every vocabulary entry and is slow to notice a truncated file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from jax.typing import DTypeLike

from minikv_jax import checks
from minikv_jax.models import families
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama, resolve_dtype
from minikv_jax.models.family import Family
from minikv_jax.models.parameters import Rule, TensorSource, read_parameters

ARCHITECTURES = tuple(dict.fromkeys(f.gguf_architecture for f in families.FAMILIES.values() if f.gguf_architecture))
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
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

RULES = (
    Rule(r"token_embd\.weight", "embed_tokens.embedding"),
    Rule(r"output_norm\.weight", "norm.scale"),
    Rule(r"output\.weight", "lm_head.kernel"),
    Rule(r"rope_freqs\.weight", None),  # in the config as rope_scaling
    Rule(r"blk\.(\d+)\.attn_norm\.weight", r"layers.\1.input_layernorm.scale"),
    Rule(r"blk\.(\d+)\.ffn_norm\.weight", r"layers.\1.post_attention_layernorm.scale"),
    Rule(r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"layers.\1.self_attn.\2_norm.scale"),
    Rule(r"blk\.(\d+)\.attn_([qkv])\.weight", r"layers.\1.self_attn.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_([qkv])\.bias", r"layers.\1.self_attn.\2_proj.bias"),
    Rule(r"blk\.(\d+)\.attn_output\.weight", r"layers.\1.self_attn.o_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_output\.bias", r"layers.\1.self_attn.o_proj.bias"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.bias", r"layers.\1.mlp.\2_proj.bias"),
)

# They go before `RULES` for families whose q and k are interleaved.
INTERLEAVED_RULES = (
    Rule(r"blk\.(\d+)\.attn_q\.weight", r"layers.\1.self_attn.q_proj.kernel", heads="num_attention_heads"),
    Rule(r"blk\.(\d+)\.attn_k\.weight", r"layers.\1.self_attn.k_proj.kernel", heads="num_key_value_heads"),
    Rule(r"blk\.(\d+)\.attn_q\.bias", r"layers.\1.self_attn.q_proj.bias", heads="num_attention_heads"),
    Rule(r"blk\.(\d+)\.attn_k\.bias", r"layers.\1.self_attn.k_proj.bias", heads="num_key_value_heads"),
)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """The place of a tensor in its file. `shape` is in row-major (NumPy) order: `[out, in]` for a matrix."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows along the last axis; a vector is one row."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file, its header read and its tensor data memory-mapped.

    `metadata` maps keys to Python values; `tensors` maps names to `GGUFTensor`. Raises FileNotFoundError, or ValueError
    naming a file that is not GGUF, is truncated, or is one part of a split model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        with self.path.open("rb") as stream:
            try:
                self.metadata, self.tensors = _read_header(stream, self.path.stat().st_size)
            except (EOFError, ValueError, KeyError, struct.error) as error:
                raise ValueError(f"{self.path} is not a complete GGUF file: {error}") from error
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{self.path} is one part of {self.metadata['split.count']}: merge the parts first")
        self._bytes = np.memmap(self.path, np.uint8, "r")

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of a tensor (of its only row for a vector), dequantised to float32.

        Raises ValueError naming the tensor for a type that the gguf package cannot dequantise.
        """
        tensor = self.tensors[name]
        vector = len(tensor.shape) == 1
        first, last = (0, 1) if vector else (start, stop)
        begin, end = tensor.start + first * tensor.row_bytes, tensor.start + last * tensor.row_bytes
        raw = np.asarray(self._bytes[begin:end]).reshape(last - first, tensor.row_bytes)
        try:
            values = dequantize(raw, tensor.kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name} of type {tensor.kind.name} cannot be dequantised") from error
        return values.reshape(-1)[start:stop] if vector else values.reshape(last - first, *tensor.shape[1:])


def _read_header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads metadata and tensor directory. Raises EOFError or ValueError saying what is wrong."""
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not start with 'GGUF'")
    version = _read_scalar(stream, "<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not one of {VERSIONS} (little-endian)")
    tensor_count, metadata_count = _read_scalar(stream, "<Q"), _read_scalar(stream, "<Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = _read_string(stream, size)
        metadata[key] = _read_value(stream, GGUFValueType(_read_scalar(stream, "<I")), size)
    directory = [_read_tensor_entry(stream, size) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    base = math.ceil(stream.tell() / alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in directory:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name}: shape {shape} does not fill blocks of {block} ({kind.name})")
        tensor = GGUFTensor(kind, shape, base + offset, shape[-1] // block * block_bytes)
        end = tensor.start + tensor.rows * tensor.row_bytes
        if end > size:
            raise EOFError(f"it is truncated: tensor {name} ends at byte {end} of {size}")
        if name in tensors:
            raise ValueError(f"tensor {name} appears twice")
        tensors[name] = tensor
    return metadata, tensors


def _read_tensor_entry(stream: BinaryIO, size: int) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = _read_string(stream, size)
    dims = [_read_scalar(stream, "<Q") for _ in range(_read_scalar(stream, "<I"))]
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


def _read_value(stream: BinaryIO, kind: GGUFValueType, size: int) -> Any:
    if kind == GGUFValueType.STRING:
        return _read_string(stream, size)
    if kind != GGUFValueType.ARRAY:
        return _read_scalar(stream, _SCALARS[kind])
    item, count = GGUFValueType(_read_scalar(stream, "<I")), _read_scalar(stream, "<Q")
    if item in _SCALARS:  # read at once: vocabularies have 10^5 entries
        dtype = np.dtype(_SCALARS[item])
        if count * dtype.itemsize > size - stream.tell():
            raise EOFError("it is truncated inside the header")
        return np.frombuffer(stream.read(count * dtype.itemsize), dtype).tolist()
    return [_read_value(stream, item, size) for _ in range(count)]


def load_gguf(
    file: GGUFFile | str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, allow_nonfinite: bool = False
) -> Llama:
    """Loads a GGUF file of a supported architecture, dequantised to `dtype`, config included.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is corrupt, has a setting that is not supported, or tensors that are missing, unknown, of
        the wrong shape or, unless allowed, not finite in `dtype` (all of them in one message). The error names it.
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    config = config_from_gguf(file)
    source = TensorSource(
        origin=str(file.path),
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        read_rows=file.read_rows,
        rules=INTERLEAVED_RULES + RULES if config.family.gguf_interleaved else RULES,
    )
    return read_parameters(config, source, resolve_dtype(dtype), allow_nonfinite=allow_nonfinite)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The ModelConfig of a GGUF file, from its metadata and the names of its tensors.

    Raises ValueError for an architecture or a setting this library does not implement, and for missing keys.
    """
    architecture = file.metadata.get("general.architecture")
    checks.choice(f"{file.path}: general.architecture", architecture, ARCHITECTURES)
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    required = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    missing = [prefix + key for key in required if key not in values]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if missing:
        raise ValueError(f"{file.path} lacks {', '.join(missing)}")
    heads = _one_for_all_layers(file, "attention.head_count", values["attention.head_count"])
    head_dim = values.get("attention.key_length", values["embedding_length"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {key}={values[key]} is not supported: it must be the head size {head_dim}")
    window = values.get("attention.sliding_window") or None
    return ModelConfig(
        model_type=_family(architecture, windowed=window is not None).model_type,
        vocab_size=values.get("vocab_size", file.tensors["token_embd.weight"].shape[0]),
        hidden_size=values["embedding_length"],
        intermediate_size=_one_for_all_layers(file, "feed_forward_length", values["feed_forward_length"]),
        num_hidden_layers=values["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=_one_for_all_layers(
            file, "attention.head_count_kv", values.get("attention.head_count_kv", heads)
        ),
        head_dim=head_dim,
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values.get("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=values.get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, values),
        attention_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        sliding_window=window,
        eos_token_ids=_stop_tokens(file.metadata),
    )


def _family(architecture: str | None, *, windowed: bool) -> Family:
    """The family of an architecture. If several share it, the one that has windows as the file has or has not."""
    candidates = [family for family in families.FAMILIES.values() if family.gguf_architecture == architecture]
    return next((family for family in candidates if (family.windows is not None) == windowed), candidates[0])


def _one_for_all_layers(file: GGUFFile, key: str, value: int | list[int]) -> int:
    """The value that all layers share: GGUF allows one per layer, this library needs them equal."""
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{file.path}: {key}={value} differs between layers, which is not supported")
    return value[0]


def _rope_scaling(file: GGUFFile, values: dict[str, Any]) -> RopeScaling | None:
    """The rope scaling: Llama 3's comes as a tensor of per-frequency divisors, a linear one as metadata."""
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{file.path}: rope.scaling.type={kind!r} is not supported: use none, linear or rope_freqs.weight"
        )
    divisors = file.tensors.get("rope_freqs.weight")
    if divisors is not None:
        factors = file.read_rows("rope_freqs.weight", 0, divisors.shape[0]).tolist()
        return RopeScaling(rope_type="factors", factors=tuple(factors))
    return RopeScaling(rope_type="linear", factor=values["rope.scaling.factor"]) if kind == "linear" else None


def _stop_tokens(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: end of sequence, of turn, of message; each at most once."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    tokens = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(token for token in tokens if token is not None))
