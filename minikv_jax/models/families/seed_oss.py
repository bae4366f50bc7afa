"""Seed-OSS (ByteDance): Llama with a head size of its own and biases in q, k and v."""

import dataclasses
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.design import LLAMA


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 8
    head_dim: bounds.Width | None = 128
    max_position_embeddings: bounds.Positions = 524288
    attention_bias: bool = True  # of q, k and v
    attention_out_bias: bool = False
    mlp_bias: bool | None = False


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the biases. Raises ValueError for a bias of the output projection alone."""
    if fields.attention_out_bias and not fields.attention_bias:
        raise ValueError("attention_out_bias is True; accepted: False unless attention_bias is True")
    design = dataclasses.replace(LLAMA, qkv_bias=fields.attention_bias)
    return {"attention_bias": fields.attention_out_bias, "own_design": design}


FAMILY = family.Family(
    model_type="seed_oss",
    fields=Fields,
    settings=settings,
    gguf=family.Gguf(architecture="seed_oss", names={"post_attention_norm": "post_attention_layernorm"}),
)
