"""Mistral 7B and its successors (arXiv 2310.06825): Llama with an optional sliding window in every layer."""

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    sliding_window: bounds.Positions | None = 4096


FAMILY = family.Family(
    model_type="mistral",
    fields=Fields,
    windows=family.same_window,
    gguf=family.Gguf(architecture="llama", interleaved=True),  # llama.cpp has no architecture of its own for Mistral
)
