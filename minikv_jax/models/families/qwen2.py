"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases in q, k and v, and optional sliding windows."""

from typing import Annotated

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 32768
    use_sliding_window: bool | None = False
    sliding_window: bounds.Positions | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: bounds.LayerTypes | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window and its layers, or none unless `use_sliding_window` is true.

    The window applies to the layers named by `layer_types`, or else to those from `max_window_layers` on.
    Raises ValueError if layer types need a window and there is none.
    """
    window, types = fields.sliding_window, fields.layer_types
    if not fields.use_sliding_window or window is None:
        if "sliding_attention" in (types or ()):
            raise ValueError(
                f"layer_types={types} has sliding_attention layers, but use_sliding_window="
                f"{fields.use_sliding_window} and sliding_window={window}"
            )
        return None, None
    if not types:
        full_layers, layers = fields.max_window_layers, range(fields.num_hidden_layers)
        types = tuple[bounds.LayerType, ...](
            "full_attention" if layer < full_layers else "sliding_attention" for layer in layers
        )
    return family.layer_windows(window, types)


FAMILY = family.Family(
    model_type="qwen2",
    fields=Fields,
    design=Design(qkv_bias=True),
    windows=windows,
    gguf=family.Gguf(architecture="qwen2"),
)
