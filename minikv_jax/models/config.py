"""The shape of a model as a validated value. Readers of files make it: `huggingface`, `gguf`, `checkpoint`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from minikv_jax import schemas
from minikv_jax.models import bounds, families
from minikv_jax.models.family import Family

DTYPES = ("float32", "bfloat16", "float16")  # of parameters and activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies differ from the plain `theta ** (-2i / H)`.

    "linear" divides all of them by `factor`. "llama3" divides the slow ones by `factor`, keeps the fast ones and blends
    between (Llama 3.1). "factors" divides frequency `i` by `factors[i]`, which is how a GGUF file stores "llama3".
    """

    rope_type: Literal["linear", "llama3", "factors"]
    factor: bounds.RopeFactor = 1.0
    low_freq_factor: bounds.RopeFactor = 1.0
    high_freq_factor: bounds.RopeFactor = 4.0
    original_max_position_embeddings: bounds.Positions = 8192
    factors: bounds.RopeFactors = ()

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        _check_fields(self)
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model, under the field names of a Hugging Face config.json.

    `model_type` names the family, a file in `minikv_jax/models/families`. `layer_types` says for each layer whether the
    sliding window holds; None means in every layer, if the model has a window.
    """

    model_type: str = "llama"
    vocab_size: bounds.Vocabulary
    hidden_size: bounds.Width
    intermediate_size: bounds.Width
    num_hidden_layers: bounds.Layers
    num_attention_heads: bounds.Heads
    num_key_value_heads: bounds.Heads
    head_dim: bounds.Width
    hidden_act: bounds.Activation = "silu"
    max_position_embeddings: bounds.Positions
    rms_norm_eps: bounds.Epsilon = 1e-6
    rope_theta: bounds.RopeBase = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # biases in q, k, v and o
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: bounds.Positions | None = None  # a query sees this many keys, itself included
    layer_types: bounds.LayerTypes | None = None
    eos_token_ids: bounds.Tokens = ()  # any of these ends a text

    @property
    def family(self) -> Family:
        """What sets the model's family apart."""
        return families.get(self.model_type)

    @property
    def qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.attention_bias or self.family.qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before the rotation."""
        return self.family.qk_norm

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None if the layer sees everything."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        families.get(self.model_type)
        _check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding turns pairs of channels")
        _check_scaling(self)
        if any(token >= self.vocab_size for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids={self.eos_token_ids} must lie in 0..{self.vocab_size - 1} (vocab_size)")
        _check_windows(self)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | os.PathLike[str] = "the config") -> ModelConfig:
        """Reads what `to_dict` wrote.

        Raises ValueError naming `source` and the first field that is unknown, missing or not accepted.
        """
        values = dict(values)
        if isinstance(scaling := values.get("rope_scaling"), Mapping):
            fields = schemas.validate(schemas.of(RopeScaling), scaling, source=f"{os.fspath(source)}: rope_scaling")
            with schemas.naming(source):
                values["rope_scaling"] = RopeScaling(**dict(fields))
        fields = schemas.validate(schemas.of(cls), values, source=source)
        with schemas.naming(source):
            return cls(**dict(fields))


def _check_fields(value: ModelConfig | RopeScaling) -> None:
    """Holds every field against its annotation, and keeps Python's numbers in place of NumPy's."""
    values = {name: field.item() if isinstance(field, np.generic) else field for name, field in vars(value).items()}
    fields = schemas.validate(schemas.of(type(value)), values, source=type(value).__name__)
    for name, field in fields:
        object.__setattr__(value, name, field)


def _check_scaling(config: ModelConfig) -> None:
    """Raises ValueError if the rope scaling has another number of factors than its type and the head size need."""
    if config.rope_scaling is None:
        return
    needed = config.head_dim // 2 if config.rope_scaling.rope_type == "factors" else 0
    if len(config.rope_scaling.factors) != needed:
        raise ValueError(
            f"rope_scaling of type {config.rope_scaling.rope_type!r} has {len(config.rope_scaling.factors)} factors, "
            f"head_dim={config.head_dim} needs {needed}"
        )


def _check_windows(config: ModelConfig) -> None:
    """Raises ValueError if the window and the layers that should use it disagree."""
    if config.layer_types is None:
        return
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.layer_types)} layers, num_hidden_layers={config.num_hidden_layers}"
        )
    if ("sliding_attention" in config.layer_types) != (config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window} disagrees with layer_types={config.layer_types}: "
            "a window needs sliding_attention layers, and they need a window"
        )
