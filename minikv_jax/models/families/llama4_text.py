"""Llama 4, text: experts, attention by chunks in the layers with RoPE, and layers without RoPE whose queries are tuned.

A model of images and text (`model_type: llama4`) is not read: its text model is.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design
from minikv_jax.models.experts import Count, Experts, Stack


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    rms_norm_eps: bounds.Epsilon = 1e-5
    head_dim: bounds.Width | None = 128
    attention_bias: bool | None = False
    intermediate_size_mlp: bounds.Width = 16384
    num_local_experts: Count = 16
    num_experts_per_tok: Count = 1
    moe_layers: bounds.LayerNumbers | None = None
    interleave_moe_layer_step: Annotated[int, Field(ge=1, le=1 << 12)] = 1
    router_jitter_noise: float = 0.0  # in training
    use_qk_norm: bool | None = True
    no_rope_layers: Annotated[tuple[Literal[0, 1], ...], Strict(False)] | None = None  # 1 for a layer with RoPE
    no_rope_layer_interval: Annotated[int, Field(ge=1)] = 4
    attention_chunk_size: bounds.Positions | None = 8192
    layer_types: bounds.AnyLayerTypes | None = None
    attn_temperature_tuning: bool | None = True
    floor_scale: bounds.Positions = 8192
    attn_scale: bounds.Multiplier = 0.1


def _layer_types(fields: Fields) -> bounds.AnyLayerTypes:
    layers = range(fields.num_hidden_layers)
    full = family.unrotated_layers(fields) if fields.attention_chunk_size else layers
    return fields.layer_types or tuple("full_attention" if n in full else "chunked_attention" for n in layers)


def settings(fields: Fields) -> dict[str, Any]:
    """Returns experts, chunks, layers without RoPE and their tuning, and the norms of queries and keys."""
    layers, step, types = range(fields.num_hidden_layers), fields.interleave_moe_layer_step, _layer_types(fields)
    sparse = range(step - 1, len(layers), step) if fields.moe_layers is None else fields.moe_layers
    experts = Experts(
        count=fields.num_local_experts,
        per_token=fields.num_experts_per_tok,
        intermediate_size=fields.intermediate_size,
        shared_size=fields.intermediate_size,
        dense_layers=tuple(layer for layer in layers if layer not in sparse),
        scoring="sigmoid",
        weighted_inputs=True,
    )
    return {
        "intermediate_size": fields.intermediate_size_mlp,
        "experts": experts,
        "layer_types": types,
        "attention_chunk_size": fields.attention_chunk_size if "chunked_attention" in types else None,
        "unrotated_layers": family.unrotated_layers(fields),
        "query_tuning": (fields.floor_scale, fields.attn_scale) if fields.attn_temperature_tuning else None,
        "own_design": dataclasses.replace(FAMILY.design, qk_norm="rotated" if fields.use_qk_norm else None),
    }


_EXPERTS = r"(model\.layers\.\d+)\.feed_forward\.experts\."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILY = family.Family(
    model_type="llama4_text",
    fields=Fields,
    design=Design(qk_norm_after_rope=True),
    settings=settings,
    names={"feed_forward.router": "mlp.router_proj"}
    | {f"feed_forward.{name}": f"mlp.{name}" for name in _PROJECTIONS}
    | {f"feed_forward.shared_expert.{name}": f"mlp.shared_expert.{name}" for name in _PROJECTIONS},
    stacks=(
        Stack(
            _EXPERTS + "gate_up_proj",
            (r"\1.mlp.experts.{expert}.gate_proj.weight", r"\1.mlp.experts.{expert}.up_proj.weight"),
            transposed=True,
        ),
        Stack(_EXPERTS + "down_proj", (r"\1.mlp.experts.{expert}.down_proj.weight",), transposed=True),
    ),
    rope_theta=500000.0,
    rope_interleaved=True,
)
