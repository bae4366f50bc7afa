"""Metadata keys of a GGUF file that describe a model, for all architectures."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from minikv_jax import checks, schemas
from minikv_jax.models import bounds, family
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
    sliding_window_pattern: Annotated[int, Field(ge=1)] | list[bool] | None = Field(
        None, alias="attention.sliding_window_pattern"
    )
    attn_logit_softcapping: bounds.Multiplier | None = None
    final_logit_softcapping: bounds.Multiplier | None = None
    logit_scale: bounds.Multiplier | None = None
    residual_scale: bounds.Multiplier | None = None
    embedding_scale: bounds.Multiplier | None = None
    use_parallel_residual: bool | None = None
    expert_count: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    experts_per_token: Count | None = Field(None, alias="expert_used_count")
    expert_length: bounds.Width | None = Field(None, alias="expert_feed_forward_length")

    @property
    def head_count(self) -> int:
        """Query heads of a layer."""
        return self._shared("attention.head_count", self.heads)

    @property
    def kv_head_count(self) -> int:
        """KV heads of a layer."""
        return self._shared("attention.head_count_kv", self.kv_heads or self.head_count)

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the MLP."""
        return self._shared("feed_forward_length", self.feed_forward_length)

    def layer_types(self, period: int) -> bounds.LayerTypes:
        """Returns the types of the layers, from `sliding_window_pattern`.

        A list says for each layer whether it has a window. A number is the period: the last layer of each has none.

        Args:
          period: the architecture's period, for files without a pattern.

        Raises:
          ValueError: the list has another length than the model.
        """
        pattern = self.sliding_window_pattern
        if not isinstance(pattern, list):
            return family.every(pattern or period, self.block_count)
        if len(pattern) != self.block_count:
            raise ValueError(
                f"attention.sliding_window_pattern names {len(pattern)} layers; accepted: a period, or one value for "
                f"each of the {self.block_count} layers"
            )
        return tuple("sliding_attention" if windowed else "full_attention" for windowed in pattern)

    def _shared(self, key: str, value: int | list[int]) -> int:
        """Returns the value of all layers. GGUF allows one per layer, but this library needs them equal."""
        if isinstance(value, int):
            return value
        if len(value) != self.block_count or len(set(value)) != 1:
            raise ValueError(
                f"{key} is {checks.shown(value)}; accepted: one value for all of the {self.block_count} layers"
            )
        return value[0]


class _Unread(schemas.Schema, extra="ignore"):
    """Keys that are accepted only if they are off, unless the family reads them."""

    rope_scale: bounds.One = Field(None, alias="rope.scale_linear")
    rope_attention_factor: bounds.One = Field(None, alias="rope.scaling.attn_factor")
    rope_sections: None = Field(None, alias="rope.dimension_sections")
    local_rope_base: None = Field(None, alias="rope.freq_base_swa")
    sliding_window_pattern: None = Field(None, alias="attention.sliding_window_pattern")
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
    layers = range(values.block_count)
    value = Experts(
        count=values.expert_count,
        per_token=values.experts_per_token,
        intermediate_size=values.expert_length or values.mlp_size,
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
