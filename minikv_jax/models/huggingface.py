"""Loads models from Hugging Face directories: config.json and safetensors."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from minikv_jax import checks, schemas
from minikv_jax.arrays import resolve_dtype
from minikv_jax.files import read_json
from minikv_jax.models import bounds, families, other_keys
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.directory import member
from minikv_jax.models.fused import split_fused
from minikv_jax.models.huggingface_rope import rope_settings
from minikv_jax.models.huggingface_tensors import fused, rules
from minikv_jax.models.parameters import read_parameters
from minikv_jax.models.stacks import from_mxfp4, unstack
from minikv_jax.models.tensors import TensorSource
from minikv_jax.models.text_part import text_config, text_tensors

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


def load_safetensors(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Llama:
    """Loads a model from a Hugging Face directory.

    Args:
      directory: holds config.json and model.safetensors, or several shards with their index.
      dtype: float32, bfloat16 or float16.
      mesh: devices to split the model over; None for JAX's default device.
      allow_nonfinite: accept parameters with NaN or infinite values.

    Returns:
      The model.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is corrupt, the config is not supported, or tensors are missing, unknown, of the wrong shape
        or, unless allowed, not finite in `dtype`. One message lists all such tensors.
    """
    directory = pathlib.Path(directory)
    config = config_from_hf(directory)
    handles = _open_shards(directory)
    stored = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (no mapping)
    slices = text_tensors(stored)
    types = {name: tensor.get_dtype() for name, tensor in slices.items()}
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    shapes, read_rows = from_mxfp4(shapes, lambda name, start, stop: slices[name][start:stop])
    if refused := sorted(
        f"{name} ({kind})" for name, kind in types.items() if name in shapes and kind not in FLOAT_TYPES
    ):
        raise ValueError(f"{directory}: tensors of a type that is not plain floating point: {checks.listed(refused)}")
    source = TensorSource(
        origin=str(directory),
        shapes=shapes,
        read_rows=read_rows,
        rules=rules(config),
        interleaved=config.family.rope_interleaved,
    )
    source = unstack(source, config.family.stacks)
    source = split_fused(source, fused(config, source.shapes))
    return read_parameters(config, source, resolve_dtype(dtype), mesh=mesh, allow_nonfinite=allow_nonfinite)


def config_from_hf(source: Mapping[str, Any] | str | os.PathLike[str]) -> ModelConfig:
    """Reads a Hugging Face config.

    The stop tokens of a generation_config.json in the same directory take precedence, as in transformers.

    Args:
      source: the fields, a config.json, or its directory.

    Returns:
      The model's config.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a field is missing or has an unsupported value.
    """
    if isinstance(source, Mapping):
        return _config_from_fields(source, "the config")
    path = pathlib.Path(source)
    path = member(path, "config.json") if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model directory needs a config.json")
    fields = read_json(path)
    generation = member(path.parent, "generation_config.json")
    if generation.is_file():
        eos = schemas.validate(_GenerationConfig, read_json(generation), source=generation).eos_token_id
        fields |= {} if eos is None else {"eos_token_id": eos}
    return _config_from_fields(fields, path)


class _GenerationConfig(schemas.Schema, extra="ignore"):
    """Fields of a generation_config.json."""

    eos_token_id: bounds.Token | bounds.Tokens | None = None


def _config_from_fields(given: Mapping[str, Any], source: str | os.PathLike[str]) -> ModelConfig:
    """Makes the ModelConfig from the fields of a config.json; see `config_from_hf`."""
    given = text_config(given)
    with schemas.naming(source):
        family = families.get(given.get("model_type"))
    others = other_keys.check(given, [f.alias or name for name, f in family.fields.model_fields.items()], source)
    fields = schemas.validate(family.fields, given, source=source)
    eos = fields.eos_token_id
    with schemas.naming(source):
        head_dim = fields.head_dim or fields.hidden_size // fields.num_attention_heads
        window, layer_types = (None, None) if family.windows is None else family.windows(fields)
        values: dict[str, Any] = {
            "model_type": family.model_type,
            "vocab_size": fields.vocab_size,
            "hidden_size": fields.hidden_size,
            "intermediate_size": fields.intermediate_size,
            "num_hidden_layers": fields.num_hidden_layers,
            "num_attention_heads": fields.num_attention_heads,
            "num_key_value_heads": fields.num_key_value_heads or fields.num_attention_heads,
            "head_dim": head_dim,
            "hidden_act": fields.hidden_act,
            "max_position_embeddings": fields.max_position_embeddings,
            "rms_norm_eps": fields.rms_norm_eps,
            **{name: bool(getattr(fields, name, None)) for name in ("attention_bias", "mlp_bias")},
            "tie_word_embeddings": bool(fields.tie_word_embeddings),
            "sliding_window": window,
            "layer_types": layer_types,
            "eos_token_ids": () if eos is None else eos if isinstance(eos, tuple) else (eos,),
        }
        values |= family.settings(fields)
        own = values.get("rotary_dim")  # of a family whose heads have channels that are never rotated
        rope = rope_settings(family, fields, own or head_dim, getattr(fields, "partial_rotary_factor", None))
        values |= rope | {"rotary_dim": rope["rotary_dim"] or own}
        _check_attention_scale(others, head_dim)
        return ModelConfig(**values)


def _check_attention_scale(others: other_keys.Settings, head_dim: int) -> None:
    """Raises ValueError if a family that does not read a scale of attention has one beside `head_dim ** -0.5`."""
    for name, plain in (("attention_multiplier", head_dim**-0.5), ("query_pre_attn_scalar", head_dim)):
        value = getattr(others, name)
        if value is not None and not math.isclose(value, plain, rel_tol=1e-6):
            raise ValueError(f"{name} is {value}; accepted: {plain}, which head_dim={head_dim} gives")


class _Index(schemas.Schema, extra="ignore"):
    """A model.safetensors.index.json, which names the file of every tensor."""

    weight_map: dict[str, str]


def _open_shards(directory: pathlib.Path) -> list[safe_open]:
    """Opens every safetensors file of the model, checked against the index if there is one."""
    index, single = (member(directory, f"model.safetensors{suffix}") for suffix in (".index.json", ""))
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(
                f"{directory} has neither {single.name} nor {index.name}; other formats are not read"
            )
        return [_open_shard(single)]
    weight_map = schemas.validate(_Index, read_json(index), source=index).weight_map
    paths = {name: member(directory, name) for name in sorted(set(weight_map.values()))}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {checks.listed(missing)}")
    handles = {name: _open_shard(path) for name, path in paths.items()}
    listed = set(weight_map.items())
    stored = {(tensor, name) for name, handle in handles.items() for tensor in handle.keys()}  # noqa: SIM118
    if listed != stored:
        wrong = sorted(f"{tensor} in {name}" for tensor, name in listed ^ stored)
        raise ValueError(f"{index} disagrees with its files about: {checks.listed(wrong)}")
    return list(handles.values())


def _open_shard(path: pathlib.Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {checks.reason(error)}") from error
