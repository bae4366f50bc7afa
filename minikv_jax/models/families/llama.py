"""Llama 2, 3 and 3.1 (arXiv 2307.09288, 2407.21783), and models of the same architecture such as SmolLM2."""

from minikv_jax.models.family import Family

FAMILY = Family(
    model_type="llama",
    defaults={"max_position_embeddings": 2048},
    switches=("attention_bias", "mlp_bias"),
    gguf_architecture="llama",
    gguf_interleaved=True,
)
