"""Command R7B and Command A (Cohere, arXiv 2504.00698): Command R with windows; layers without one have no RoPE."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 8192
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="layer_norm_eps")
    tie_word_embeddings: bool | None = True
    attention_bias: bool | None = False
    logit_scale: bounds.Multiplier | None = 0.0625
    sliding_window: bounds.Positions | None = 4096
    sliding_window_pattern: Annotated[int, Field(ge=1)] = 4
    layer_types: bounds.LayerTypes | None = None
    layer_switch: int | None = None  # not read by transformers
    order_of_interleaved_layers: Literal["local_attn_first"] | None = None
    position_embedding_type: Literal["rope_gptj"] | None = None
    use_gated_activation: Literal[True] | None = None
    use_parallel_block: Literal[True] | None = None


def _types(fields: Fields) -> bounds.LayerTypes:
    return fields.layer_types or family.every(fields.sliding_window_pattern, fields.num_hidden_layers)


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to three of four layers unless `layer_types` says otherwise."""
    return family.layer_windows(fields.sliding_window, _types(fields))


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the factor of the logits, and the layers without RoPE: those that see all keys."""
    return {"logit_multiplier": fields.logit_scale or 1.0, "unrotated_layers": family.full_layers(_types(fields))}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the factor of the logits, and the windows: three of four layers by default. The others have no RoPE."""
    del tensors
    types = values.layer_types(4)
    window, layer_types = family.layer_windows(values.sliding_window or None, types)
    return {
        "logit_multiplier": values.logit_scale or 1.0,
        "sliding_window": window,
        "layer_types": layer_types,
        "unrotated_layers": family.full_layers(types),
    }


FAMILY = family.Family(
    model_type="cohere2",
    fields=Fields,
    design=Design(norm="layer_norm_no_bias", parallel=True),
    windows=windows,
    settings=settings,
    rope_interleaved=True,
    gguf=family.Gguf(
        architecture="cohere2",
        interleaved=True,
        reads=("logit_scale", "sliding_window_pattern"),
        settings=gguf_settings,
    ),
)
