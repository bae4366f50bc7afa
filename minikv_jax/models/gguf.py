"""Loads models from GGUF files: the config from the metadata, the parameters from the tensors."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from pydantic import Field

from minikv_jax import checks, schemas
from minikv_jax.arrays import resolve_dtype
from minikv_jax.models import bounds, families
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama
from minikv_jax.models.family import Family
from minikv_jax.models.gguf_file import GGUFFile
from minikv_jax.models.parameters import read_parameters
from minikv_jax.models.tensors import Rule, TensorSource

ARCHITECTURES = tuple(dict.fromkeys(f.gguf_architecture for f in families.FAMILIES.values() if f.gguf_architecture))

RULES = (
    Rule(r"token_embd\.weight", "embed_tokens.embedding"),
    Rule(r"output_norm\.weight", "norm.scale"),
    Rule(r"output\.weight", "lm_head.kernel"),
    Rule(r"rope_freqs\.weight", None),  # becomes the config's rope_scaling
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


class _Settings(schemas.Schema, extra="ignore"):
    """Metadata keys of an architecture. Those after the blank line are accepted only if they are off."""

    context_length: bounds.Positions
    embedding_length: bounds.Width
    block_count: bounds.Layers
    feed_forward_length: bounds.Width | list[bounds.Width]
    heads: bounds.Heads | list[bounds.Heads] = Field(alias="attention.head_count")
    kv_heads: bounds.Heads | list[bounds.Heads] | None = Field(None, alias="attention.head_count_kv")
    key_length: bounds.Width | None = Field(None, alias="attention.key_length")
    value_length: bounds.Width | None = Field(None, alias="attention.value_length")
    rotated_length: bounds.Width | None = Field(None, alias="rope.dimension_count")
    epsilon: bounds.Epsilon = Field(alias="attention.layer_norm_rms_epsilon")
    sliding_window: Annotated[int, Field(ge=0, lt=1 << 31)] = Field(0, alias="attention.sliding_window")
    vocab_size: bounds.Vocabulary | None = None
    rope_base: bounds.RopeBase = Field(10000.0, alias="rope.freq_base")
    scaling_type: Literal["none", "linear"] = Field("none", alias="rope.scaling.type")
    scaling_factor: bounds.RopeFactor | None = Field(None, alias="rope.scaling.factor")

    rope_scale: bounds.One = Field(None, alias="rope.scale_linear")
    rope_attention_factor: bounds.One = Field(None, alias="rope.scaling.attn_factor")
    rope_sections: None = Field(None, alias="rope.dimension_sections")
    attention_scale: None = Field(None, alias="attention.scale")
    attention_clamp: None = Field(None, alias="attention.clamp_kqv")
    alibi_bias: None = Field(None, alias="attention.max_alibi_bias")
    causal: Literal[True] = Field(True, alias="attention.causal")
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    logit_scale: bounds.One = None
    residual_scale: bounds.One = None
    embedding_scale: bounds.One = None
    use_parallel_residual: bounds.Off = None
    expert_count: Literal[0] | None = None


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
        rules=RULES,
        interleaved=config.family.gguf_interleaved,
    )
    return read_parameters(config, source, resolve_dtype(dtype), mesh=mesh, allow_nonfinite=allow_nonfinite)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads a model's config from the metadata and the tensor names of a GGUF file.

    Raises:
      ValueError: the architecture or a setting is not supported, or a key is missing.
    """
    architecture = file.metadata.get("general.architecture")
    checks.choice(f"{file.path}: general.architecture", architecture, ARCHITECTURES)
    values = file.section(_Settings, str(architecture))
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor token_embd.weight")
    stops = file.section(_StopTokens, "tokenizer.ggml")
    with schemas.naming(file.path):
        heads = _one_for_all_layers("attention.head_count", values.heads, values.block_count)
        head_dim = values.key_length or values.embedding_length // heads
        for name, size in (
            ("attention.value_length", values.value_length),
            ("rope.dimension_count", values.rotated_length),
        ):
            if size not in (None, head_dim):
                raise ValueError(f"{architecture}.{name} is {size}; accepted: the head size {head_dim}")
        return ModelConfig(
            model_type=_family(str(architecture), windowed=values.sliding_window > 0).model_type,
            vocab_size=values.vocab_size or file.tensors["token_embd.weight"].shape[0],
            hidden_size=values.embedding_length,
            intermediate_size=_one_for_all_layers(
                "feed_forward_length", values.feed_forward_length, values.block_count
            ),
            num_hidden_layers=values.block_count,
            num_attention_heads=heads,
            num_key_value_heads=_one_for_all_layers(
                "attention.head_count_kv", values.kv_heads or heads, values.block_count
            ),
            head_dim=head_dim,
            max_position_embeddings=values.context_length,
            rms_norm_eps=values.epsilon,
            rope_theta=values.rope_base,
            rope_scaling=_rope_scaling(file, values),
            attention_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_up.bias" in file.tensors,
            tie_word_embeddings="output.weight" not in file.tensors,
            sliding_window=values.sliding_window or None,
            eos_token_ids=tuple(dict.fromkeys(token for _, token in stops if token is not None)),
        )


def _family(architecture: str, *, windowed: bool) -> Family:
    """Returns the family of an architecture. If several share it, windows in the file decide."""
    candidates = [family for family in families.FAMILIES.values() if family.gguf_architecture == architecture]
    return next((family for family in candidates if (family.windows is not None) == windowed), candidates[0])


def _one_for_all_layers(key: str, value: int | list[int], layers: int) -> int:
    """Returns the value shared by all layers. GGUF allows one per layer, but this library needs them equal."""
    if isinstance(value, int):
        return value
    if len(value) != layers or len(set(value)) != 1:
        raise ValueError(f"{key} is {checks.shown(value)}; accepted: one value for all of the {layers} layers")
    return value[0]


def _rope_scaling(file: GGUFFile, values: _Settings) -> RopeScaling | None:
    """Reads the rope scaling: Llama 3's is a tensor of per-frequency divisors, a linear one is metadata."""
    linear = values.scaling_type == "linear"
    if linear and values.scaling_factor is None:
        raise ValueError("rope.scaling.type is 'linear', but there is no rope.scaling.factor")
    divisors = file.tensors.get("rope_freqs.weight")
    if divisors is None:
        return RopeScaling(rope_type="linear", factor=values.scaling_factor or 1.0) if linear else None
    if linear:
        raise ValueError("both rope.scaling.type 'linear' and rope_freqs.weight are given; accepted: one of them")
    if len(divisors.shape) != 1 or divisors.shape[0] > bounds.MOST_WIDTH:
        raise ValueError(f"rope_freqs.weight is {list(divisors.shape)}; accepted: one number for each pair of channels")
    file.check_types()
    factors = file.read_rows("rope_freqs.weight", 0, divisors.shape[0]).tolist()
    return RopeScaling(rope_type="factors", factors=tuple(factors))
