"""`ModelConfig`: the validated shape of a model, read from files by `huggingface`, `gguf` and `checkpoint`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from minikv_jax import schemas
from minikv_jax.models import bounds, families
from minikv_jax.models.family import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies `theta ** (-2i / H)` for longer contexts.

    Attributes:
      rope_type: "linear" divides all frequencies by `factor`. "llama3" divides the slow ones by `factor`, keeps the
        fast ones and blends in between (Llama 3.1, arXiv 2407.21783). "factors" divides frequency `i` by `factors[i]`,
        which is how a GGUF file stores "llama3".
      factor: the divisor of "linear" and "llama3".
      low_freq_factor: "llama3" scales fully what turns fewer times than this over the original context.
      high_freq_factor: "llama3" leaves unchanged what turns more often than this.
      original_max_position_embeddings: the original context of "llama3", in tokens.
      factors: `H / 2` divisors of "factors", empty otherwise.

    Raises:
      ValueError: a value is not accepted. The message names the first such field.
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
    """The shape of a model, with the field names of a Hugging Face config.json.

    Attributes:
      model_type: the model family, a file in `minikv_jax/models/families`.
      vocab_size: vocabulary entries, `V`.
      hidden_size: channels of the residual stream, `D`.
      intermediate_size: hidden channels of the MLP.
      num_hidden_layers: layers, `L`.
      num_attention_heads: query heads, `N`, a multiple of `K`.
      num_key_value_heads: KV heads, `K`.
      head_dim: channels per head, `H`, an even number.
      hidden_act: activation of the MLP: "silu", "gelu", "gelu_pytorch_tanh" or "relu".
      max_position_embeddings: the longest context, in tokens.
      rms_norm_eps: epsilon of the norms.
      rope_theta: base of the rotary frequencies.
      rope_scaling: their scaling, if any.
      attention_bias: biases in the q, k, v and o projections.
      mlp_bias: biases in the MLP.
      tie_word_embeddings: the embedding also serves as the output projection.
      sliding_window: keys that a query sees, itself included; None for all of them.
      layer_types: "full_attention" or "sliding_attention" for each layer. None: `sliding_window` applies to all layers.
      eos_token_ids: tokens that end a text.

    Raises:
      ValueError: a value is not accepted. The message names the first such field.
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
        """The model family, which describes its architecture and its files."""
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
        """The sliding window of a layer in tokens; None if the layer sees all keys."""
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
        """Converts the config to JSON values for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str | os.PathLike[str] = "the config") -> ModelConfig:
        """Makes a config from the values written by `to_dict`.

        Args:
          values: the fields by name.
          source: what error messages call the origin of the values, such as a path.

        Returns:
          The config.

        Raises:
          ValueError: a field is unknown, missing or not accepted. The message names `source` and the first such field.
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
    """Checks every field against its annotation, and replaces NumPy's numbers by Python's."""
    values = {name: field.item() if isinstance(field, np.generic) else field for name, field in vars(value).items()}
    fields = schemas.validate(schemas.of(type(value)), values, source=type(value).__name__)
    for name, field in fields:
        object.__setattr__(value, name, field)


def _check_scaling(config: ModelConfig) -> None:
    """Raises ValueError if the number of rope factors does not match the scaling type and the head size."""
    if config.rope_scaling is None:
        return
    needed = config.head_dim // 2 if config.rope_scaling.rope_type == "factors" else 0
    if len(config.rope_scaling.factors) != needed:
        raise ValueError(
            f"rope_scaling of type {config.rope_scaling.rope_type!r} has {len(config.rope_scaling.factors)} factors, "
            f"head_dim={config.head_dim} needs {needed}"
        )


def _check_windows(config: ModelConfig) -> None:
    """Raises ValueError if `sliding_window` and `layer_types` contradict each other."""
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
