"""`Family`: the differences between model families. Each file in `families/` defines one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from pydantic import model_validator

from minikv_jax.models import bounds
from minikv_jax.models.design import LLAMA, Design
from minikv_jax.schemas import Schema

# The sliding window, and the type of every layer (None: the window applies to all layers).
Windows = tuple[int | None, bounds.LayerTypes | None]


class RopeFields(Schema):
    """Rotary settings of a config.json. Null keys count as left out."""

    rope_type: Literal["default", "linear", "llama3"] | None = None
    type: Literal["default", "linear", "llama3"] | None = None  # older name of `rope_type`
    rope_theta: bounds.RopeBase | None = None
    factor: bounds.RopeFactor | None = None
    low_freq_factor: bounds.RopeFactor | None = None
    high_freq_factor: bounds.RopeFactor | None = None
    original_max_position_embeddings: bounds.Positions | None = None
    partial_rotary_factor: bounds.One = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Fields(Schema, extra="ignore"):
    """Fields of a config.json that all families read; a family adds its own, with the defaults of transformers.

    Unlisted fields are ignored, as in transformers. Those after the blank line belong to computations of other
    architectures, and are accepted only if they are off.
    """

    vocab_size: bounds.Vocabulary
    hidden_size: bounds.Width
    intermediate_size: bounds.Width
    num_hidden_layers: bounds.Layers
    num_attention_heads: bounds.Heads
    num_key_value_heads: bounds.Heads | None = None
    head_dim: bounds.Width | None = None
    hidden_act: bounds.Activation = "silu"
    max_position_embeddings: bounds.Positions
    rms_norm_eps: bounds.Epsilon = 1e-6
    rope_theta: bounds.RopeBase | None = None
    rope_parameters: RopeFields | None = None  # transformers 5
    rope_scaling: RopeFields | None = None  # transformers before 5
    original_max_position_embeddings: bounds.Positions | None = None
    tie_word_embeddings: bool | None = False
    eos_token_id: bounds.Token | bounds.Tokens | None = None

    quantization_config: None = None
    compression_config: None = None
    partial_rotary_factor: bounds.One = None
    rotary_pct: bounds.One = None
    embedding_multiplier: bounds.One = None
    residual_multiplier: bounds.One = None
    logits_scaling: bounds.One = None
    logit_scale: bounds.One = None
    scale_emb: bounds.One = None
    attention_multiplier: float | None = None  # replaces head_dim ** -0.5
    query_pre_attn_scalar: float | None = None  # replaces head_dim
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    clip_qkv: None = None
    attention_chunk_size: None = None
    scale_depth: None = None
    dim_model_base: None = None
    no_rope_layers: list[Literal[1]] | None = None
    no_rope_layer_interval: None = None
    use_qk_norm: bounds.Off = None
    qk_layernorm: bounds.Off = None
    attn_temperature_tuning: bounds.Off = None
    rope_interleave: bounds.Off = None
    use_parallel_residual: bounds.Off = None
    parallel_attn: bounds.Off = None
    alibi: bounds.Off = None
    add_cross_attention: bounds.Off = None
    is_encoder_decoder: bounds.Off = None
    use_bidirectional_attention: bounds.Off = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its architecture and the names in its files.

    Attributes:
      model_type: its name in a Hugging Face config.json.
      fields: the fields read from a config.json. It lists `attention_bias` and `mlp_bias` only if transformers reads
        them for this family.
      design: how the layers are built.
      windows: returns the sliding window and the layer types from `fields`. None: the architecture has no windows.
      gguf_architecture: its `general.architecture` in a GGUF file. If families share one, a file with a sliding window
        belongs to the family that has `windows`.
      gguf_interleaved: GGUF files interleave the two halves of every q and k head channel by channel, because llama.cpp
        rotates neighbouring channels in this architecture.
    """

    model_type: str
    fields: type[Fields]
    design: Design = LLAMA
    windows: Callable[[Any], Windows] | None = None
    gguf_architecture: str | None = None
    gguf_interleaved: bool = False
