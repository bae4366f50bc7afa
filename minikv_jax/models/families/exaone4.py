"""EXAONE 4 (arXiv 2507.11407): norms after attention and MLP, and no RoPE in the layers without a window."""

from collections.abc import Collection
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design
from minikv_jax.models.families import olmo2


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 32
    max_position_embeddings: bounds.Positions = 2048
    rms_norm_eps: bounds.Epsilon = 1e-5
    sliding_window: bounds.Positions | None = 4096
    sliding_window_pattern: str | int | None = 4
    layer_types: bounds.LayerTypes | None = None


def _types(fields: Fields) -> bounds.LayerTypes:
    layers, pattern = fields.num_hidden_layers, fields.sliding_window_pattern
    if fields.sliding_window is None:
        return ("full_attention",) * layers
    if fields.layer_types is not None:
        return fields.layer_types
    if not isinstance(pattern, int) or pattern < 1:
        raise ValueError(f"sliding_window_pattern is {pattern!r}; accepted: layer_types, or a positive integer")
    return family.every(pattern, layers)


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to three of four layers unless `layer_types` says otherwise."""
    return family.layer_windows(fields.sliding_window, _types(fields))


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the layers without RoPE: those that see all keys, if there are windows at all."""
    if fields.sliding_window is None:
        return {}
    return {"unrotated_layers": family.full_layers(_types(fields))}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the windows, if any: three of four layers by default. The others have no RoPE."""
    del tensors
    if not values.sliding_window:
        return {}
    types = values.layer_types(4)
    window, layer_types = family.layer_windows(values.sliding_window, types)
    return {"sliding_window": window, "layer_types": layer_types, "unrotated_layers": family.full_layers(types)}


FAMILY = family.Family(
    model_type="exaone4",
    fields=Fields,
    design=Design(pre_norms=False, post_norms=True, qk_norm="head"),
    windows=windows,
    settings=settings,
    names=olmo2.NAMES,
    gguf=family.Gguf(architecture="exaone4", reads=("sliding_window_pattern",), settings=gguf_settings),
)
