"""Gemma 2 (arXiv 2408.00118): Gemma with norms on both sides, soft caps, and a window in every other layer."""

import dataclasses
from collections.abc import Collection
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.families import gemma


class Fields(gemma.Fields):
    """Fields of a config.json in addition to those of Gemma."""

    query_pre_attn_scalar: bounds.Multiplier = 256
    sliding_window: bounds.Positions | None = 4096
    sliding_window_size: bounds.Positions | None = None  # not read by transformers
    layer_types: bounds.LayerTypes | None = None
    attn_logit_softcapping: bounds.Multiplier | None = 50.0
    final_logit_softcapping: bounds.Multiplier | None = 30.0


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to every other layer unless `layer_types` says otherwise."""
    return family.layer_windows(fields.sliding_window, fields.layer_types or family.every(2, fields.num_hidden_layers))


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the factors of embeddings and attention, and the soft caps."""
    return {
        "embedding_multiplier": fields.hidden_size**0.5,
        "hidden_act": fields.hidden_activation or "gelu_pytorch_tanh",
        "attention_multiplier": fields.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": fields.attn_logit_softcapping,
        "final_logit_softcapping": fields.final_logit_softcapping,
    }


NAMES = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
DESIGN = dataclasses.replace(gemma.DESIGN, post_norms=True)


def gguf_values(values: Any, *, largest: int, period: int) -> dict[str, Any]:
    """Returns what GGUF files leave to the architecture, whose model of `largest` layers scales attention otherwise."""
    own_scale = (values.embedding_length / values.head_count) ** -0.5 if values.block_count == largest else None
    window, types = family.layer_windows(values.sliding_window or None, values.layer_types(period))
    return {
        "embedding_multiplier": values.embedding_length**0.5,
        "attention_multiplier": own_scale,
        "attn_logit_softcapping": values.attn_logit_softcapping,
        "final_logit_softcapping": values.final_logit_softcapping,
        "sliding_window": window,
        "layer_types": types,
    }


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the values of a GGUF file. Every other layer has a window by default; 27B has 46 layers."""
    del tensors
    return gguf_values(values, largest=46, period=2)


FAMILY = family.Family(
    model_type="gemma2",
    fields=Fields,
    design=DESIGN,
    windows=windows,
    settings=settings,
    names=NAMES,
    gguf=family.Gguf(
        architecture="gemma2",
        plus_one=True,
        reads=("attn_logit_softcapping", "final_logit_softcapping", "sliding_window_pattern"),
        settings=gguf_settings,
    ),
)
