"""Llama 2, 3 and 3.1 (arXiv 2307.09288, 2407.21783), and models of the same architecture such as SmolLM2."""

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 2048
    attention_bias: bool | None = False
    mlp_bias: bool | None = False


FAMILY = family.Family(model_type="llama", fields=Fields, gguf=family.Gguf(architecture="llama", interleaved=True))
