"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219): Llama with joined projections, and LongRoPE for long contexts."""

from typing import Literal

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 4096
    original_max_position_embeddings: bounds.Positions | None = 4096
    rms_norm_eps: bounds.Epsilon = 1e-5
    sliding_window: bounds.Positions | None = None
    partial_rotary_factor: bounds.Share | None = None
    attention_bias: bounds.Off = False
    mlp_bias: bounds.Off = False
    lm_head_bias: bounds.Off = False
    full_attn_mod: Literal[1] | None = 1
    interpolate_factor: Literal[1] | None = 1


FAMILY = family.Family(
    model_type="phi3",
    fields=Fields,
    windows=family.same_window,
    rotary_share=1.0,
    gguf=family.Gguf(architecture="phi3", reads=("rope_attention_factor",)),
)
