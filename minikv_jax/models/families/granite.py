"""Granite 3 (https://arxiv.org/abs/2405.04324): Llama with factors of embeddings, attention, residuals and logits."""

from collections.abc import Collection
from typing import Any

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 2048
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    embedding_multiplier: bounds.Multiplier = 1.0
    attention_multiplier: bounds.Multiplier = 1.0
    residual_multiplier: bounds.Multiplier = 1.0
    logits_scaling: bounds.Multiplier = 1.0


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the factors."""
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier")
    return {name: getattr(fields, name) for name in names} | {"logit_multiplier": 1 / fields.logits_scaling}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the factors in a GGUF file."""
    del tensors
    return {
        "embedding_multiplier": values.embedding_scale or 1.0,
        "attention_multiplier": values.attention_scale,
        "residual_multiplier": values.residual_scale or 1.0,
        "logit_multiplier": 1 / (values.logit_scale or 1.0),
    }


FAMILY = family.Family(
    model_type="granite",
    fields=Fields,
    settings=settings,
    gguf=family.Gguf(
        architecture="granite",
        interleaved=True,
        reads=("attention_scale", "embedding_scale", "residual_scale", "logit_scale"),
        settings=gguf_settings,
    ),
)
