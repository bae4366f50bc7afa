"""OLMo 3: OLMo 2 with windows in three of four layers, which rotate without scaling."""

from collections.abc import Collection
from typing import Any

from minikv_jax.models import bounds, family
from minikv_jax.models.families import olmo2


class Fields(olmo2.Fields):
    """Fields of a config.json in addition to those of OLMo 2."""

    sliding_window: bounds.Positions | None = 4096
    layer_types: bounds.LayerTypes | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to three of four layers unless `layer_types` says otherwise."""
    return family.layer_windows(fields.sliding_window, fields.layer_types or family.every(4, fields.num_hidden_layers))


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the rotary base of the layers with a window, which is that of the others."""
    return {"local_rope_theta": fields.rope_theta or FAMILY.rope_theta}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the windows: three of four layers by default, which rotate without scaling."""
    del tensors
    window, types = family.layer_windows(values.sliding_window, values.layer_types(4))
    return {"sliding_window": window, "layer_types": types, "local_rope_theta": values.rope_base}


FAMILY = family.Family(
    model_type="olmo3",
    fields=Fields,
    design=olmo2.DESIGN,
    windows=windows,
    settings=settings,
    names=olmo2.NAMES,
    rope_theta=500000.0,
    rope_by_layer_type=True,
    gguf=family.Gguf(architecture="olmo2", reads=("sliding_window_pattern",), settings=gguf_settings),
)
