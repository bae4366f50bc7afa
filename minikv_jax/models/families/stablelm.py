"""StableLM (arXiv 2402.17834): LayerNorm, a quarter of the channels rotated, and optional parallel blocks."""

import dataclasses
from collections.abc import Collection
from typing import Any

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 32
    max_position_embeddings: bounds.Positions = 4096
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="layer_norm_eps")
    partial_rotary_factor: bounds.Share | None = None
    use_qkv_bias: bool = False
    use_parallel_residual: bool = False
    qk_layernorm: bounds.Off = False
    rotary_scaling_factor: bounds.One = None


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the layers' design, which the config decides."""
    design = dataclasses.replace(FAMILY.design, qkv_bias=fields.use_qkv_bias, parallel=fields.use_parallel_residual)
    return {"own_design": design}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the layers' design."""
    biased = "blk.0.attn_q.bias" in tensors
    parallel = bool(values.use_parallel_residual)
    return {"own_design": dataclasses.replace(FAMILY.design, qkv_bias=biased, parallel=parallel)}


FAMILY = family.Family(
    model_type="stablelm",
    fields=Fields,
    design=Design(norm="layer_norm"),
    settings=settings,
    rotary_share=0.25,
    gguf=family.Gguf(architecture="stablelm", reads=("use_parallel_residual",), settings=gguf_settings),
)
