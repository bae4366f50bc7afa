"""Gemma 2 (arXiv 2408.00118): Gemma with norms on both sides, soft caps, and a window in every other layer."""

import dataclasses
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.families import gemma


class Fields(gemma.Fields):
    """Fields of a config.json in addition to those of Gemma."""

    query_pre_attn_scalar: bounds.Multiplier = 256
    sliding_window: bounds.Positions | None = 4096
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
FAMILY = family.Family(
    model_type="gemma2",
    fields=Fields,
    design=DESIGN,
    windows=windows,
    settings=settings,
    names=NAMES,
)
