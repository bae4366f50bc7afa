"""Mistral 7B and its successors (arXiv 2310.06825): Llama with an optional sliding window in every layer."""

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    sliding_window: bounds.Positions | None = 4096


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to every layer; `sliding_window: null` turns it off."""
    return fields.sliding_window, None


FAMILY = family.Family(
    model_type="mistral",
    fields=Fields,
    windows=windows,
    gguf=family.Gguf(architecture="llama", interleaved=True),  # llama.cpp has no architecture of its own for Mistral
)
