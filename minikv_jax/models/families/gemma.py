"""Gemma 1 (arXiv 2403.08295): scaled embeddings, norms that multiply by one plus their weight, a GELU MLP."""

from collections.abc import Collection
from typing import Any

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    head_dim: bounds.Width | None = 256
    hidden_act: bounds.Activation = "gelu_pytorch_tanh"
    hidden_activation: bounds.Activation | None = None  # another name of `hidden_act`, which wins
    max_position_embeddings: bounds.Positions = 8192
    tie_word_embeddings: bool | None = True
    attention_bias: bool | None = False
    eos_token_id: bounds.Token | bounds.Tokens | None = Field(default=1)


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the embeddings' factor. Files that say "gelu" mean its tanh approximation, as in transformers."""
    act = fields.hidden_activation or fields.hidden_act
    return {
        "embedding_multiplier": fields.hidden_size**0.5,
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act,
    }


DESIGN = Design(norm="rms_norm_1p")


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the values of a GGUF file that are the same for all models of the family."""
    del tensors
    return {"embedding_multiplier": values.embedding_length**0.5}


FAMILY = family.Family(
    model_type="gemma",
    fields=Fields,
    design=DESIGN,
    settings=settings,
    gguf=family.Gguf(architecture="gemma", plus_one=True, settings=gguf_settings),
)
