"""Mistral 7B and its successors (arXiv 2310.06825): Llama with, if the config has one, a window in every layer."""

from collections.abc import Mapping
from typing import Any

from minikv_jax.models.family import Family, Windows


def windows(fields: Mapping[str, Any]) -> Windows:
    """The window holds in every layer; `sliding_window: null` turns it off."""
    return fields["sliding_window"], None


FAMILY = Family(
    model_type="mistral",
    defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
    windows=windows,
    gguf_architecture="llama",  # llama.cpp has no architecture of its own for Mistral
    gguf_interleaved=True,
)
