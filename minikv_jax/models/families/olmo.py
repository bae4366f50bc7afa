"""OLMo 1 (arXiv 2402.00838): Llama with LayerNorms that have no parameters."""

from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 2048
    attention_bias: bool | None = False
    clip_qkv: None = None


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the fixed epsilon of the norms."""
    del fields
    return {"rms_norm_eps": 1e-5}


FAMILY = family.Family(
    model_type="olmo",
    fields=Fields,
    design=Design(norm="layer_norm_plain"),
    settings=settings,
    gguf=family.Gguf(architecture="olmo", interleaved=True),
)
