"""The shape of a model as a validated value. Readers of files make it: `huggingface`, `gguf`, `checkpoint`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minikv_jax import checks
from minikv_jax.models import families
from minikv_jax.models.family import LAYER_TYPES, Family

DTYPES = ("float32", "bfloat16", "float16")  # of parameters and activations
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
ROPE_SCALINGS = ("linear", "llama3", "factors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies differ from the plain `theta ** (-2i / H)`.

    "linear" divides all of them by `factor`. "llama3" divides the slow ones by `factor`, keeps the fast ones and blends
    between (Llama 3.1). "factors" divides frequency `i` by `factors[i]`, which is how a GGUF file stores "llama3".
    """

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown type or a factor that cannot be divided by."""
        checks.choice("rope_type", self.rope_type, ROPE_SCALINGS)
        if not self.factor > 0 or any(not f > 0 for f in self.factors):
            raise ValueError(f"rope scaling factors must be positive, got factor={self.factor}, factors={self.factors}")
        if self.rope_type != "llama3":
            return
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be positive"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model, under the field names of a Hugging Face config.json.

    `model_type` names the family, a file in `minikv_jax/models/families`. `layer_types` says for each layer whether the
    sliding window holds; None means in every layer, if the model has a window.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # biases in q, k, v and o
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # a query sees this many keys, itself included
    layer_types: tuple[str, ...] | None = None
    eos_token_ids: tuple[int, ...] = ()  # any of these ends a text

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
        checks.choice("hidden_act", self.hidden_act, ACTIVATIONS)
        for name in _POSITIVE_INTEGERS:
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), 1))
        for name in ("rms_norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding turns pairs of channels")
        _check_scaling(self)
        _check_stop_tokens(self)
        _check_windows(self)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_dict` wrote. Raises ValueError naming the fields that are unknown or missing."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - set(known)), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"not a ModelConfig: unknown fields {unknown}, missing fields {missing}")
        values = dict(values)
        if (scaling := values.get("rope_scaling")) is not None:
            values["rope_scaling"] = RopeScaling(**scaling | {"factors": tuple(scaling["factors"])})
        if values.get("layer_types") is not None:
            values["layer_types"] = tuple(values["layer_types"])
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        return cls(**values)


_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


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


def _check_stop_tokens(config: ModelConfig) -> None:
    """Raises ValueError for stop tokens that are no integers, or lie outside the vocabulary."""
    for token in config.eos_token_ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"eos_token_ids={config.eos_token_ids}: expected integers")
    if any(token < 0 or token >= config.vocab_size for token in config.eos_token_ids):
        raise ValueError(f"eos_token_ids={config.eos_token_ids} must lie in 0..{config.vocab_size - 1} (vocab_size)")


def _check_windows(config: ModelConfig) -> None:
    """Raises ValueError if the window and the layers that should use it disagree."""
    if config.sliding_window is not None:
        checks.integer("sliding_window", config.sliding_window, 1)
    if config.layer_types is None:
        return
    for kind in config.layer_types:
        checks.choice("layer_types entry", kind, LAYER_TYPES)
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.layer_types)} layers, num_hidden_layers={config.num_hidden_layers}"
        )
    if ("sliding_attention" in config.layer_types) != (config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window} disagrees with layer_types={config.layer_types}: "
            "a window needs sliding_attention layers, and they need a window"
        )
