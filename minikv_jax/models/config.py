"""The shape of a model, read from its Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from minikv_jax import checks

# What `transformers` assumes where a config.json leaves the field out; the other fields of a family are required.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
MODEL_TYPES = tuple(_FAMILY_DEFAULTS)
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
LAYER_TYPES = ("full_attention", "sliding_attention")


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
        checks.choice("rope_type", self.rope_type, ("linear", "llama3", "factors"))
        if not self.factor > 0 or any(not f > 0 for f in self.factors):
            raise ValueError(f"rope scaling factors must be positive, got factor={self.factor}, factors={self.factors}")
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.rope_type == "llama3" and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be positive"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama-family model, under the field names of a Hugging Face config.json.

    `model_type` is the family: "llama" (Llama 2, 3, SmolLM2), "mistral", "qwen2" (q/k/v biases), "qwen3" (q/k norms).
    `layer_types` says per layer whether the sliding window holds; None: in all layers, if there is a window at all.
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
    def qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before the rotation."""
        return self.model_type == "qwen3"

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None where the layer sees everything."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        checks.choice("model_type", self.model_type, MODEL_TYPES)
        checks.choice("hidden_act", self.hidden_act, ACTIVATIONS)
        for name in _POSITIVE_FIELDS:
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
        per_pair = self.rope_scaling is not None and self.rope_scaling.rope_type == "factors"
        if self.rope_scaling is not None and len(self.rope_scaling.factors) != per_pair * self.head_dim // 2:
            raise ValueError(
                f"rope_scaling of type {self.rope_scaling.rope_type!r} has {len(self.rope_scaling.factors)} factors, "
                f"head_dim={self.head_dim} needs {per_pair * self.head_dim // 2}"
            )
        for token in self.eos_token_ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ValueError(f"eos_token_ids={self.eos_token_ids}: expected integers")
        if any(token < 0 or token >= self.vocab_size for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids={self.eos_token_ids} must lie in 0..{self.vocab_size - 1} (vocab_size)")
        _check_windows(self)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> ModelConfig:
        """Reads a Hugging Face config: a dict, a config.json, or the directory that holds one.

        From a directory the stop tokens of generation_config.json win over those of config.json, as in transformers.
        Raises ValueError for a missing field or a value this library does not implement, FileNotFoundError if absent.
        """
        if isinstance(source, Mapping):
            return _from_hf_dict(source)
        path = pathlib.Path(source)
        directory = path if path.is_dir() else path.parent
        raw = _read_json(path / "config.json" if path.is_dir() else path)
        generation = directory / "generation_config.json"
        if generation.is_file() and (eos := _read_json(generation).get("eos_token_id")) is not None:
            raw["eos_token_id"] = eos
        return _from_hf_dict(raw)

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


_POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_REQUIRED_HF_FIELDS = _POSITIVE_FIELDS[:5]


def _number(name: str, value: object) -> float:
    """A JSON number as a float: files write 10000 as well as 10000.0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number")
    return float(value)


def _check_windows(config: ModelConfig) -> None:
    """Raises ValueError where the window and the layers that should use it disagree."""
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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model directory needs a config.json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, a config is an object")
    return value


def _from_hf_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the fields of a config.json; see `ModelConfig.from_hf`."""
    model_type = str(raw.get("model_type"))
    checks.choice("model_type", model_type, MODEL_TYPES)
    raw = _FAMILY_DEFAULTS[model_type] | dict(raw)
    if missing := [name for name in _REQUIRED_HF_FIELDS if raw.get(name) is None]:
        raise ValueError(f"the config of a {model_type} model lacks {', '.join(missing)}")
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config={raw['quantization_config']!r} is not supported: use plain safetensors or GGUF"
        )
    for name in _REQUIRED_HF_FIELDS:
        checks.integer(name, raw[name], 1)
    theta, scaling = _rope_from_hf(raw)
    window, layer_types = _windows_from_hf(raw)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        model_type=model_type,
        **{name: raw[name] for name in _REQUIRED_HF_FIELDS},
        num_key_value_heads=_given(raw, "num_key_value_heads", raw["num_attention_heads"]),
        head_dim=_given(raw, "head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
        hidden_act=raw.get("hidden_act", "silu"),
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        # Mistral and Qwen2 have no such switches: transformers never reads them there, so neither do we.
        attention_bias=model_type in ("llama", "qwen3") and _switch(raw, "attention_bias"),
        mlp_bias=model_type == "llama" and _switch(raw, "mlp_bias"),
        tie_word_embeddings=_switch(raw, "tie_word_embeddings"),
        sliding_window=window,
        layer_types=layer_types,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


def _given(raw: Mapping[str, Any], name: str, otherwise: int) -> int:
    """A field that may be left out or null."""
    return otherwise if raw.get(name) is None else raw[name]


def _switch(raw: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is left out or null."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return bool(value)


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_scaling={given!r}: expected an object")
    rope = dict(given)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rope_parameters per layer type ({', '.join(nested)}) are not supported: use one set for all")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    checks.choice("rope_type", rope_type, ROPE_TYPES)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial!r} is not supported: use 1.0")
    theta = _number("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if rope_type == "default":
        return theta, None
    names = ["factor"] if rope_type == "linear" else ["factor", "low_freq_factor", "high_freq_factor"]
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"rope_type={rope_type!r} needs {', '.join(missing)} in the rope parameters")
    values: dict[str, Any] = {name: _number(name, rope[name]) for name in names}
    if rope_type == "llama3":
        original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original or raw["max_position_embeddings"]
    return theta, RopeScaling(rope_type=rope_type, **values)


def _windows_from_hf(raw: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...] | None]:
    """Sliding window and the layers it holds in, by the rules of each family."""
    if raw["model_type"] == "llama":
        return None, None  # the architecture has no window, whatever else the file says
    window = raw["sliding_window"]
    if raw["model_type"] == "mistral":
        return window, None  # the window holds in every layer
    if not raw.get("use_sliding_window", False) or window is None:
        if "sliding_attention" in (raw.get("layer_types") or ()):
            raise ValueError(
                f"layer_types={raw['layer_types']} has sliding_attention layers, but use_sliding_window="
                f"{raw.get('use_sliding_window', False)} and sliding_window={window}"
            )
        return None, None
    layers = range(raw["num_hidden_layers"])
    first = raw["max_window_layers"]
    types = raw.get("layer_types") or [LAYER_TYPES[layer >= first] for layer in layers]
    if "sliding_attention" not in types:
        return None, None
    return window, None if set(types) == {"sliding_attention"} else tuple(types)
