"""Ministral: Mistral with a window in some or all layers."""

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    sliding_window: bounds.Positions | None = 4096
    layer_types: bounds.LayerTypes | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to all layers unless `layer_types` says otherwise."""
    if fields.layer_types is None:
        return family.same_window(fields)
    return family.layer_windows(fields.sliding_window, fields.layer_types)


FAMILY = family.Family(model_type="ministral", fields=Fields, windows=windows)
