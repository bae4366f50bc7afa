"""Metadata keys of a GGUF file that describe a model, for all architectures."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from minikv_jax import schemas
from minikv_jax.models import bounds
from minikv_jax.models.experts import Count, Experts


class Settings(schemas.Schema, extra="ignore"):
    """Keys of an architecture. Those after the blank line change the computation: a family lists those it reads."""

    context_length: bounds.Positions
    embedding_length: bounds.Width
    block_count: bounds.Layers
    feed_forward_length: bounds.Width | list[bounds.Width]
    heads: bounds.Heads | list[bounds.Heads] = Field(alias="attention.head_count")
    kv_heads: bounds.Heads | list[bounds.Heads] | None = Field(None, alias="attention.head_count_kv")
    key_length: bounds.Width | None = Field(None, alias="attention.key_length")
    value_length: bounds.Width | None = Field(None, alias="attention.value_length")
    rotated_length: bounds.Width | None = Field(None, alias="rope.dimension_count")
    epsilon: bounds.Epsilon | None = Field(None, alias="attention.layer_norm_rms_epsilon")
    layer_norm_epsilon: bounds.Epsilon | None = Field(None, alias="attention.layer_norm_epsilon")
    sliding_window: Annotated[int, Field(ge=0, lt=1 << 31)] = Field(0, alias="attention.sliding_window")
    vocab_size: bounds.Vocabulary | None = None
    rope_base: bounds.RopeBase = Field(10000.0, alias="rope.freq_base")
    scaling_type: Literal["none", "linear"] = Field("none", alias="rope.scaling.type")
    scaling_factor: bounds.RopeFactor | None = Field(None, alias="rope.scaling.factor")
    original_context: bounds.Positions | None = Field(None, alias="rope.scaling.original_context_length")

    rope_attention_factor: bounds.RopeFactor | None = Field(None, alias="rope.scaling.attn_factor")
    attention_scale: bounds.Multiplier | None = Field(None, alias="attention.scale")
    local_rope_base: bounds.RopeBase | None = Field(None, alias="rope.freq_base_swa")
    attn_logit_softcapping: bounds.Multiplier | None = None
    final_logit_softcapping: bounds.Multiplier | None = None
    logit_scale: bounds.Multiplier | None = None
    residual_scale: bounds.Multiplier | None = None
    embedding_scale: bounds.Multiplier | None = None
    use_parallel_residual: bool | None = None
    expert_count: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    experts_per_token: Count | None = Field(None, alias="expert_used_count")
    expert_length: bounds.Width | None = Field(None, alias="expert_feed_forward_length")


class _Unread(schemas.Schema, extra="ignore"):
    """Keys that are accepted only if they are off, unless the family reads them."""

    rope_scale: bounds.One = Field(None, alias="rope.scale_linear")
    rope_attention_factor: bounds.One = Field(None, alias="rope.scaling.attn_factor")
    rope_sections: None = Field(None, alias="rope.dimension_sections")
    local_rope_base: None = Field(None, alias="rope.freq_base_swa")
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


def experts(values: Settings, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the experts of an architecture whose weights add up to 1, as a family's `Gguf.settings`.

    Raises:
      ValueError: the number of a token's experts is missing.
    """
    if values.experts_per_token is None:
        raise ValueError(f"expert_used_count is missing, though expert_count is {values.expert_count}")
    feed_forward = values.feed_forward_length
    layers = range(values.block_count)
    size = values.expert_length or (feed_forward if isinstance(feed_forward, int) else feed_forward[0])
    value = Experts(
        count=values.expert_count,
        per_token=values.experts_per_token,
        intermediate_size=size,
        normalised=True,
        dense_layers=tuple(layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in tensors),
    )
    return {"experts": value}


def check_unread(
    metadata: Mapping[str, Any], architecture: str, reads: tuple[str, ...], source: str | os.PathLike[str]
) -> None:
    """Raises ValueError naming a key that changes the computation and is not among those that the family `reads`."""
    prefix = f"{architecture}."
    known = {field.alias or name for name, field in _Unread.model_fields.items() if name in reads}
    others = {
        name: value
        for key, value in metadata.items()
        if key.startswith(prefix) and (name := key.removeprefix(prefix)) not in known
    }
    schemas.validate(_Unread, others, source=source, within=architecture)
