"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases in q, k and v, and windows that a config switches on."""

from collections.abc import Mapping
from typing import Any

from minikv_jax.models.family import Family, Windows


def windows(fields: Mapping[str, Any]) -> Windows:
    """Reads windows that are off unless `use_sliding_window` is true.

    They hold in the layers that `layer_types` names, or else from layer `max_window_layers` on.
    Raises ValueError for layer types that need a window when there is none.
    """
    window, types = fields["sliding_window"], fields.get("layer_types")
    if not fields.get("use_sliding_window", False) or window is None:
        if "sliding_attention" in (types or ()):
            raise ValueError(
                f"layer_types={types} has sliding_attention layers, but use_sliding_window="
                f"{fields.get('use_sliding_window', False)} and sliding_window={window}"
            )
        return None, None
    if not types:
        full_layers = fields["max_window_layers"]
        layers = range(fields["num_hidden_layers"])
        types = ["full_attention" if layer < full_layers else "sliding_attention" for layer in layers]
    if "sliding_attention" not in types:
        return None, None
    return window, None if set(types) == {"sliding_attention"} else tuple(types)


FAMILY = Family(
    model_type="qwen2",
    defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    qkv_bias=True,
    windows=windows,
    gguf_architecture="qwen2",
)
