"""SmolLM3: Llama without RoPE in every fourth layer."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 4
    max_position_embeddings: bounds.Positions = 32768
    tie_word_embeddings: bool | None = True
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    no_rope_layers: Annotated[tuple[Literal[0, 1], ...], Strict(False)] | None = None  # 1 for a layer with RoPE
    no_rope_layer_interval: Annotated[int, Field(ge=1)] = 4
    use_sliding_window: bool | None = False
    max_window_layers: int | None = None  # not read by transformers
    sliding_window: bounds.Positions | None = None
    layer_types: bounds.LayerTypes | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window of the layers without RoPE, if `use_sliding_window` is true."""
    types = fields.layer_types
    if not fields.use_sliding_window or fields.sliding_window is None:
        return family.layer_windows(None, types or ())
    unrotated = family.unrotated_layers(fields)
    by_layer: tuple[bounds.LayerType, ...] = tuple(
        "sliding_attention" if layer in unrotated else "full_attention" for layer in range(fields.num_hidden_layers)
    )
    return family.layer_windows(fields.sliding_window, types or by_layer)


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the layers without RoPE."""
    return {"unrotated_layers": family.unrotated_layers(fields)}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the layers without RoPE: every fourth one."""
    del tensors
    return {"unrotated_layers": tuple(range(3, values.block_count, 4))}


FAMILY = family.Family(
    model_type="smollm3",
    fields=Fields,
    windows=windows,
    settings=settings,
    rope_theta=2000000.0,
    gguf=family.Gguf(architecture="smollm3", interleaved=True, settings=gguf_settings),
)
