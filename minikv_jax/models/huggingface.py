"""Hugging Face model directories: config.json and safetensors."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from minikv_jax import checks
from minikv_jax.files import read_json
from minikv_jax.models import families
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama, resolve_dtype
from minikv_jax.models.parameters import Rule, TensorSource, read_parameters

ROPE_TYPES = ("default", "linear", "llama3")
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

RULES = (
    Rule(r"model\.embed_tokens\.weight", "embed_tokens.embedding"),
    Rule(r"model\.norm\.weight", "norm.scale"),
    Rule(r"lm_head\.weight", "lm_head.kernel"),
    Rule(r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight", r"layers.\1.\2.scale"),
    Rule(r"model\.layers\.(\d+)\.self_attn\.([qk]_norm)\.weight", r"layers.\1.self_attn.\2.scale"),
    Rule(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.weight", r"layers.\1.\2.\3.kernel"),
    Rule(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.bias", r"layers.\1.\2.\3.bias"),
    Rule(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),  # Llama 2 files; computed from the config
)


def load_safetensors(
    directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, allow_nonfinite: bool = False
) -> Llama:
    """Loads a Hugging Face model directory: config.json and model.safetensors, single or sharded with its index.

    Parameters are cast to `dtype` (float32, bfloat16 or float16) and placed on JAX's default device.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is corrupt, the config is not supported, or tensors are missing, unknown, of the wrong shape
        or, unless allowed, not finite in `dtype` (all of them in one message).
    """
    directory = pathlib.Path(directory)
    config = config_from_hf(directory)
    handles = _open_shards(directory)
    slices = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (no mapping)
    types = {name: tensor.get_dtype() for name, tensor in slices.items()}
    if refused := sorted(f"{name} ({kind})" for name, kind in types.items() if kind not in FLOAT_TYPES):
        raise ValueError(f"{directory}: tensors of a type that is not plain floating point: {', '.join(refused)}")
    source = TensorSource(
        origin=str(directory),
        shapes={name: tuple(tensor.get_shape()) for name, tensor in slices.items()},
        read_rows=lambda name, start, stop: slices[name][start:stop],
        rules=RULES,
    )
    return read_parameters(config, source, resolve_dtype(dtype), allow_nonfinite=allow_nonfinite)


def config_from_hf(source: Mapping[str, Any] | str | os.PathLike[str]) -> ModelConfig:
    """Reads a Hugging Face config: a dict, a config.json, or the directory that holds one.

    Beside a config.json, the stop tokens of a generation_config.json win over its own, as in transformers.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a field is missing, or has a value that this library does not implement.
    """
    if isinstance(source, Mapping):
        return _config_from_fields(source)
    path = pathlib.Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model directory needs a config.json")
    fields = read_json(path)
    generation = path.parent / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        fields["eos_token_id"] = eos
    return _config_from_fields(fields)


def _config_from_fields(given: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json's fields; see `config_from_hf`."""
    family = families.get(str(given.get("model_type")))
    fields = {**family.defaults, **given}
    if missing := [name for name in REQUIRED_FIELDS if fields.get(name) is None]:
        raise ValueError(f"the config of a {family.model_type} model lacks {', '.join(missing)}")
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config={fields['quantization_config']!r} is not supported: use plain safetensors or GGUF"
        )
    for name in REQUIRED_FIELDS:
        checks.integer(name, fields[name], 1)
    theta, scaling = _rope(fields)
    window, layer_types = (None, None) if family.windows is None else family.windows(fields)
    eos = fields.get("eos_token_id")
    return ModelConfig(
        model_type=family.model_type,
        **{name: fields[name] for name in REQUIRED_FIELDS},
        num_key_value_heads=_given(fields, "num_key_value_heads", fields["num_attention_heads"]),
        head_dim=_given(fields, "head_dim", fields["hidden_size"] // fields["num_attention_heads"]),
        hidden_act=fields.get("hidden_act", "silu"),
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=_number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        **{name: _switch(fields, name) for name in family.switches},
        tie_word_embeddings=_switch(fields, "tie_word_embeddings"),
        sliding_window=window,
        layer_types=layer_types,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


def _given(fields: Mapping[str, Any], name: str, default: int) -> int:
    """A field that may be left out or null."""
    return default if fields.get(name) is None else fields[name]


def _number(name: str, value: object) -> float:
    """A JSON number as a float: files write 10000 as well as 10000.0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number")
    return float(value)


def _switch(fields: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false if it is left out or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return bool(value)


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_scaling={given!r}: expected an object")
    rope = dict(given)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rope_parameters per layer type ({', '.join(nested)}) are not supported: use one set for all")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    checks.choice("rope_type", rope_type, ROPE_TYPES)
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial!r} is not supported: use 1.0")
    theta = _number("rope_theta", rope.get("rope_theta", fields.get("rope_theta", 10000.0)))
    if rope_type == "default":
        return theta, None
    names = ["factor"] if rope_type == "linear" else ["factor", "low_freq_factor", "high_freq_factor"]
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"rope_type={rope_type!r} needs {', '.join(missing)} in the rope parameters")
    values: dict[str, Any] = {name: _number(name, rope[name]) for name in names}
    if rope_type == "llama3":
        original = rope.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original or fields["max_position_embeddings"]
    return theta, RopeScaling(rope_type=rope_type, **values)


def _open_shards(directory: pathlib.Path) -> list[safe_open]:
    """Every safetensors file of the model, checked against the index if there is one."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(
                f"{directory} has neither {single.name} nor {index.name}; other formats are not read"
            )
        return [_open_shard(single)]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is not a safetensors index: expected an object weight_map of tensors and file names")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    handles = {name: _open_shard(directory / name) for name in names}
    listed = set(weight_map.items())
    stored = {(tensor, name) for name, handle in handles.items() for tensor in handle.keys()}  # noqa: SIM118
    if listed != stored:
        wrong = sorted(f"{tensor} in {name}" for tensor, name in listed ^ stored)
        raise ValueError(f"{index} disagrees with its files about: {', '.join(wrong)}")
    return list(handles.values())


def _open_shard(path: pathlib.Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
