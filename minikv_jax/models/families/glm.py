"""GLM-4 9B (arXiv 2406.12793): Llama with half of the channels rotated, neighbour by neighbour."""

import dataclasses
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.design import LLAMA


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 2
    head_dim: bounds.Width | None = 128
    max_position_embeddings: bounds.Positions = 131072
    rms_norm_eps: bounds.Epsilon = 1.5625e-07
    partial_rotary_factor: bounds.Share | None = None
    qkv_bias: bool | None = None
    attention_bias: bool | None = True  # of q, k and v


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the biases, which the output projection does not have."""
    design = dataclasses.replace(LLAMA, qkv_bias=bool(fields.attention_bias))
    return {"own_design": design, "attention_bias": False}


FAMILY = family.Family(
    model_type="glm",
    fields=Fields,
    settings=settings,
    rope_interleaved=True,
    rotary_share=0.5,
)
