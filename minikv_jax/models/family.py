"""`Family`: the differences between model families. Each file in `families/` defines one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from pydantic import model_validator

from minikv_jax.models import bounds
from minikv_jax.models.design import LLAMA, Design
from minikv_jax.models.experts import Stack
from minikv_jax.schemas import Schema

# The sliding window, and the type of every layer (None: the window applies to all layers).
Windows = tuple[int | None, bounds.LayerTypes | None]


RopeType = Literal["default", "linear", "llama3", "yarn", "longrope", "su", "dynamic"]


class RopeFields(Schema):
    """Rotary settings of a config.json. Null keys count as left out."""

    rope_type: RopeType | None = None
    type: RopeType | None = None  # older name of `rope_type`
    rope_theta: bounds.RopeBase | None = None
    factor: bounds.RopeFactor | None = None
    low_freq_factor: bounds.RopeFactor | None = None
    high_freq_factor: bounds.RopeFactor | None = None
    original_max_position_embeddings: bounds.Positions | None = None
    partial_rotary_factor: bounds.Share | None = None
    short_factor: bounds.RopeFactors = ()
    long_factor: bounds.RopeFactors = ()
    attention_factor: bounds.RopeFactor | None = None
    beta_fast: bounds.RopeFactor | None = None
    beta_slow: bounds.RopeFactor | None = None
    mscale: bounds.Scale | None = None
    mscale_all_dim: bounds.Scale | None = None
    truncate: bool | None = None
    alpha: bounds.RopeFactor | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class RopeByLayerType(Schema):
    """Rotary settings for each type of layer, in a config.json of transformers 5."""

    full_attention: RopeFields | None = None
    sliding_attention: RopeFields | None = None


class Fields(Schema, extra="ignore"):
    """Fields of a config.json that all families read; a family adds its own, with the defaults of transformers.

    Other keys are accepted only if they have no effect on the logits or are off (`other_keys.py`).
    """

    vocab_size: bounds.Vocabulary
    hidden_size: bounds.Width
    intermediate_size: bounds.Width
    num_hidden_layers: bounds.Layers
    num_attention_heads: bounds.Heads
    num_key_value_heads: bounds.Heads | None = None
    head_dim: bounds.Width | None = None
    hidden_act: bounds.Activation = "silu"
    max_position_embeddings: bounds.Positions
    rms_norm_eps: bounds.Epsilon = 1e-6
    rope_theta: bounds.RopeBase | None = None
    rope_parameters: RopeFields | RopeByLayerType | None = None  # transformers 5
    rope_scaling: RopeFields | None = None  # transformers before 5
    original_max_position_embeddings: bounds.Positions | None = None
    tie_word_embeddings: bool | None = False
    eos_token_id: bounds.Token | bounds.Tokens | None = None


def no_settings(fields: Fields) -> dict[str, Any]:
    """Returns no values: the family reads nothing beside the fields of all families."""
    del fields
    return {}


def one_of(fields: Fields, *names: str, default: int) -> int:
    """Returns the value that a file gives under one of several names. Raises ValueError if they disagree."""
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(f'{name}={value}' for name, value in given.items())} disagree")
    return next(iter(given.values()), default)


def no_gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns no values: the keys of all architectures suffice."""
    del values, tensors
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gguf:
    """A family's GGUF files.

    Attributes:
      architecture: their `general.architecture`. If families share one, a file with a sliding window belongs to the
        family that has `windows`.
      interleaved: they interleave the two halves of every q and k head channel by channel, because llama.cpp rotates
        neighbouring channels in this architecture.
      plus_one: the weights of norms are stored with one added.
      names: names of a layer's modules that stand for others than usual (`gguf.rules`), and ours.
      reads: fields of `gguf_settings.Settings` that this family reads; elsewhere they are refused.
      settings: returns values of a `ModelConfig` from the `gguf_settings.Settings` and the names of the tensors.
    """

    architecture: str
    interleaved: bool = False
    plus_one: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    settings: Callable[[Any, Collection[str]], dict[str, Any]] = no_gguf_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its architecture and the names in its files.

    Attributes:
      model_type: its name in a Hugging Face config.json.
      fields: the fields read from a config.json. It lists `attention_bias` and `mlp_bias` only if transformers reads
        them for this family.
      design: how the layers are built.
      windows: returns the sliding window and the layer types from `fields`. None: the architecture has no windows.
      settings: returns further values of a `ModelConfig` from `fields`.
      names: names of modules in Hugging Face files that are not Llama's, and ours, relative to the layer or the model;
        "*" stands for the number of an expert.
      stacks: tensors of Hugging Face files that hold the matrices of all experts.
      predicts_further: files may have layers beyond the model's, which predict later tokens and are not read.
      rope_theta: base of the rotary frequencies if a config.json gives none.
      rope_interleaved: Hugging Face's attention rotates neighbouring channels, not the halves of a head.
      rotary_share: share of a head's channels that is rotated if a config.json gives none; None: all are, always.
      rope_by_layer_type: layers with a sliding window have rotary settings of their own.
      gguf: its GGUF files; None if llama.cpp does not know the family.
    """

    model_type: str
    fields: type[Fields]
    design: Design = LLAMA
    windows: Callable[[Any], Windows] | None = None
    settings: Callable[[Any], dict[str, Any]] = no_settings
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    predicts_further: bool = False
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    rotary_share: float | None = None
    rope_by_layer_type: bool = False
    gguf: Gguf | None = None


def layer_windows(window: int | None, types: bounds.LayerTypes) -> Windows:
    """Returns the windows of layers of the given types: none if no layer has one."""
    if "sliding_attention" not in types:
        return None, None
    return window, None if set(types) == {"sliding_attention"} else types


def every(period: int, layers: int) -> bounds.LayerTypes:
    """Returns layer types of which each `period`-th is full attention and the others have a window."""
    return tuple("sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers))


def full_layers(types: bounds.LayerTypes) -> tuple[int, ...]:
    """Returns the numbers of the layers of full attention."""
    return tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")


def same_window(fields: Any) -> Windows:
    """Returns the window of a config.json for all layers, as a family's `windows`; `sliding_window: null` is none."""
    return fields.sliding_window, None


def unrotated_layers(fields: Any) -> tuple[int, ...]:
    """Returns the numbers of the layers without RoPE, from `no_rope_layers` or `no_rope_layer_interval`.

    Raises:
      ValueError: `no_rope_layers` has another length than the model.
    """
    layers = range(fields.num_hidden_layers)
    if not fields.no_rope_layers:
        return tuple(layer for layer in layers if (layer + 1) % fields.no_rope_layer_interval == 0)
    if len(fields.no_rope_layers) != len(layers):
        raise ValueError(f"no_rope_layers names {len(fields.no_rope_layers)} layers, num_hidden_layers={len(layers)}")
    return tuple(layer for layer in layers if not fields.no_rope_layers[layer])
