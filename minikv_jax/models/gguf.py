"""Loads models from GGUF files: the config from the metadata, the parameters from the tensors."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minikv_jax import checks, schemas
from minikv_jax.arrays import resolve_dtype
from minikv_jax.models import bounds, families, gguf_settings
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama
from minikv_jax.models.experts import Stack
from minikv_jax.models.family import Family, Gguf
from minikv_jax.models.fused import Parts, split_fused
from minikv_jax.models.gguf_file import GGUFFile
from minikv_jax.models.parameters import read_parameters
from minikv_jax.models.projections import joined
from minikv_jax.models.stacks import unstack
from minikv_jax.models.tensors import Rule, TensorSource

ARCHITECTURES = tuple(dict.fromkeys(f.gguf.architecture for f in families.FAMILIES.values() if f.gguf))

# Norms of a layer, by their names in GGUF files.
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "attention_output_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "mlp_output_norm",
}
_RULES = (
    Rule(r"token_embd\.weight", "embed_tokens.embedding"),
    Rule(r"output_norm\.weight", "norm.scale"),
    Rule(r"output_norm\.bias", "norm.bias"),
    Rule(r"output\.weight", "lm_head.kernel"),
    Rule(r"output\.bias", "lm_head.bias"),
    Rule(r"rope_(freqs|factors_long|factors_short)\.weight", None),  # become the config's rope_scaling
    Rule(r"blk\.(\d+)\.attn_([qkv])\.weight", r"layers.\1.self_attn.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_([qkv])\.bias", r"layers.\1.self_attn.\2_proj.bias"),
    Rule(r"blk\.(\d+)\.attn_output\.weight", r"layers.\1.self_attn.o_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_output\.bias", r"layers.\1.self_attn.o_proj.bias"),
    Rule(r"blk\.(\d+)\.ffn_gate_inp\.weight", r"layers.\1.mlp.router_proj.kernel"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight", r"layers.\1.mlp.experts.\3.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.bias", r"layers.\1.mlp.\2_proj.bias"),
)
_STACKS = (Stack(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight", (r"\1.{expert}.weight",)),)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rules of a model's family."""
    norms = _NORMS | dict(_gguf(config.family).names)
    weights = (Rule(rf"blk\.(\d+)\.{theirs}\.weight", rf"layers.\1.{ours}.scale") for theirs, ours in norms.items())
    biases = (Rule(rf"blk\.(\d+)\.{theirs}\.bias", rf"layers.\1.{ours}.bias") for theirs, ours in norms.items())
    return (*weights, *biases, *_RULES)


def _gguf(family: Family) -> Gguf:
    assert family.gguf is not None
    return family.gguf


class _StopTokens(schemas.Schema, extra="ignore"):
    """Metadata keys with the tokens that end a text, a turn and a message."""

    eos_token_id: bounds.Token | None = None
    eot_token_id: bounds.Token | None = None
    eom_token_id: bounds.Token | None = None


def load_gguf(
    file: GGUFFile | str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Llama:
    """Loads a model from a GGUF file and dequantises it to `dtype`.

    Args:
      file: the file or its path.
      dtype: float32, bfloat16 or float16.
      mesh: devices to split the model over; None for JAX's default device.
      allow_nonfinite: accept parameters with NaN or infinite values.

    Returns:
      The model.

    Raises:
      FileNotFoundError: `file` does not exist.
      ValueError: the file is corrupt or has an unsupported setting, or tensors are missing, unknown, of the wrong shape
        or, unless allowed, not finite in `dtype`. One message names the file and all such tensors.
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    config = config_from_gguf(file)
    file.check_types()
    source = TensorSource(
        origin=str(file.path),
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        read_rows=file.read_rows,
        rules=rules(config),
        interleaved=_gguf(config.family).interleaved,
        plus_one=_gguf(config.family).plus_one,
    )
    source = split_fused(unstack(source, _STACKS), _fused(config, file))
    return read_parameters(config, source, resolve_dtype(dtype), mesh=mesh, allow_nonfinite=allow_nonfinite)


def _fused(config: ModelConfig, file: GGUFFile) -> dict[str, Parts]:
    """Returns the tensors that hold several projections: q, k and v, or the MLP's gate and up."""
    heads, wide = joined(config, "qkv_proj").sizes, joined(config, "gate_up_proj").sizes
    fused: dict[str, Parts] = {}
    for name in file.tensors:
        block, _, rest = name.rpartition(".attn_qkv.")
        if block:
            fused[name] = {f"{block}.attn_{part}.{rest}": rows for part, rows in zip("qkv", heads, strict=True)}
        block, _, rest = name.rpartition(".ffn_up.")
        if block and config.design.gated_mlp and f"{block}.ffn_gate.{rest}" not in file.tensors:
            parts = (f"{block}.ffn_gate.{rest}", name)
            fused[name] = dict(zip(parts, wide, strict=True))
    return fused


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads a model's config from the metadata and the tensor names of a GGUF file.

    Raises:
      ValueError: the architecture or a setting is not supported, or a key is missing.
    """
    architecture = file.metadata.get("general.architecture")
    checks.choice(f"{file.path}: general.architecture", architecture, ARCHITECTURES)
    values = file.section(gguf_settings.Settings, str(architecture))
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    stops = file.section(_StopTokens, "tokenizer.ggml")
    family = _family(str(architecture), windowed=values.sliding_window > 0, sparse=values.expert_count > 0)
    epsilon = _epsilon(family, values, file)
    gguf_settings.check_unread(file.metadata, str(architecture), _gguf(family).reads, file.path)
    with schemas.naming(file.path):
        heads = values.head_count
        head_dim = values.key_length or values.embedding_length // heads
        settings: dict[str, Any] = {
            "model_type": family.model_type,
            "vocab_size": values.vocab_size or file.tensors["token_embd.weight"].shape[0],
            "hidden_size": values.embedding_length,
            "intermediate_size": values.mlp_size,
            "num_hidden_layers": values.block_count,
            "num_attention_heads": heads,
            "num_key_value_heads": values.kv_head_count,
            "head_dim": head_dim,
            "hidden_act": family.fields.model_fields["hidden_act"].default,
            "max_position_embeddings": values.context_length,
            "rms_norm_eps": epsilon,
            "rope_theta": values.rope_base,
            "rotary_dim": _rotary_dim(family, values, str(architecture), head_dim),
            "rope_scaling": _rope_scaling(file, values),
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "sliding_window": values.sliding_window or None,
            "eos_token_ids": tuple(dict.fromkeys(token for _, token in stops if token is not None)),
        }
        settings |= _biases(family, file)
        settings |= _gguf(family).settings(values, file.tensors.keys())
        return ModelConfig(**settings)


def _family(architecture: str, *, windowed: bool, sparse: bool) -> Family:
    """Returns the family of an architecture. If several share it, experts and windows in the file decide."""
    all_of_it = [f for f in families.FAMILIES.values() if f.gguf is not None and f.gguf.architecture == architecture]
    candidates = [f for f in all_of_it if ("expert_count" in _gguf(f).reads) == sparse] or all_of_it
    return next((family for family in candidates if (family.windows is not None) == windowed), candidates[0])


def _epsilon(family: Family, values: gguf_settings.Settings, file: GGUFFile) -> float:
    """Returns the epsilon of the family's kind of norm."""
    centred = family.design.norm_form.centred
    epsilon = values.layer_norm_epsilon if centred else values.epsilon
    if epsilon is None:
        key = "layer_norm_epsilon" if centred else "layer_norm_rms_epsilon"
        raise ValueError(f"{file.path} lacks {_gguf(family).architecture}.attention.{key}")
    return epsilon


def _rotary_dim(family: Family, values: gguf_settings.Settings, architecture: str, head_dim: int) -> int | None:
    """Returns the number of rotated channels, if the family may rotate a part of them."""
    if values.value_length not in (None, head_dim):
        raise ValueError(
            f"{architecture}.attention.value_length is {values.value_length}; accepted: the head size {head_dim}"
        )
    if family.rotary_share is None and values.rotated_length not in (None, head_dim):
        raise ValueError(
            f"{architecture}.rope.dimension_count is {values.rotated_length}; accepted: the head size {head_dim}"
        )
    return None if values.rotated_length == head_dim else values.rotated_length


def _biases(family: Family, file: GGUFFile) -> dict[str, Any]:
    """Returns which projections of attention have biases, as the tensors tell."""
    out = "blk.0.attn_output.bias" in file.tensors
    inputs = any(f"blk.0.attn_{name}.bias" in file.tensors for name in ("q", "qkv"))
    if inputs and not out and not family.design.qkv_bias:
        return {"own_design": dataclasses.replace(family.design, qkv_bias=True)}
    return {"attention_bias": out}


def _rope_scaling(file: GGUFFile, values: gguf_settings.Settings) -> RopeScaling | None:
    """Reads the rope scaling: divisors of the frequencies are tensors, a linear one is metadata."""
    linear = values.scaling_type == "linear"
    if linear and values.scaling_factor is None:
        raise ValueError("rope.scaling.type is 'linear', but there is no rope.scaling.factor")
    names = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
    given = [name for name in names if name in file.tensors]
    if not given:
        return RopeScaling(rope_type="linear", factor=values.scaling_factor or 1.0) if linear else None
    if linear:
        raise ValueError(f"both rope.scaling.type 'linear' and {given[0]} are given; accepted: one of them")
    file.check_types()
    divisors = [_divisors(file, name) for name in given]
    if given == ["rope_freqs.weight"]:
        return RopeScaling(rope_type="factors", factors=divisors[0])
    if given != list(names[1:]) or values.original_context is None:
        raise ValueError(f"{', '.join(given)}; accepted: both factors and rope.scaling.original_context_length")
    return RopeScaling(
        rope_type="longrope",
        factors=divisors[0],
        long_factors=divisors[1],
        original_max_position_embeddings=values.original_context,
        attention_factor=values.rope_attention_factor or 1.0,
    )


def _divisors(file: GGUFFile, name: str) -> tuple[float, ...]:
    shape = file.tensors[name].shape
    if len(shape) != 1 or shape[0] > bounds.MOST_WIDTH:
        raise ValueError(f"{name} is {list(shape)}; accepted: one number for each pair of channels")
    return tuple(file.read_rows(name, 0, shape[0]).tolist())
