"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with norms of queries and keys, and five local layers to a global one."""

import dataclasses
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.families import gemma2


class Fields(gemma2.Fields):
    """Fields of a config.json in addition to those of Gemma 2."""

    vocab_size: bounds.Vocabulary = 262208
    num_attention_heads: bounds.Heads = 8
    num_key_value_heads: bounds.Heads | None = 4
    max_position_embeddings: bounds.Positions = 131072
    sliding_window_pattern: Annotated[int, Field(ge=1)] = 6
    rope_local_base_freq: bounds.RopeBase = 10000.0
    attn_logit_softcapping: bounds.Multiplier | None = None
    final_logit_softcapping: bounds.Multiplier | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to all but each sixth layer unless `layer_types` says otherwise."""
    types = fields.layer_types or family.every(fields.sliding_window_pattern, fields.num_hidden_layers)
    return family.layer_windows(fields.sliding_window, types)


def settings(fields: Fields) -> dict[str, Any]:
    """Returns Gemma 2's settings and the rotary base of the layers with a window."""
    return gemma2.settings(fields) | {"local_rope_theta": fields.rope_local_base_freq}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the values of a GGUF file. All but each sixth layer have a window by default; 27B has 62 layers."""
    del tensors
    local = {"local_rope_theta": values.local_rope_base or 10000.0}
    return gemma2.gguf_values(values, largest=62, period=6) | local


FAMILY = family.Family(
    model_type="gemma3_text",
    fields=Fields,
    design=dataclasses.replace(gemma2.DESIGN, qk_norm="head"),
    windows=windows,
    settings=settings,
    names=gemma2.NAMES,
    rope_theta=1000000.0,
    rope_by_layer_type=True,
    gguf=family.Gguf(
        architecture="gemma3",
        plus_one=True,
        reads=("final_logit_softcapping", "local_rope_base", "sliding_window_pattern"),
        settings=gguf_settings,
    ),
)
