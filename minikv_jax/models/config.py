"""What a run needs to know: the model's shape (`ModelConfig`) and the compression method (`CacheConfig`)."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minikv_jax import checks
from minikv_jax.methods.base import BUDGETS, MAX_BLOCK, QUANTIZERS, SCORERS, Option

BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
RESIDUAL_RULES = ("minikv", "kivi")
POOLINGS = ("max", "mean")

# Bits of a code are stored in planes of these widths (docs/architecture.md, "Packed layout").
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CacheConfig:
    """One KV-cache compression method: which tokens are kept, and how the kept ones are stored.

    Budgets are shares of the prompt (a float in 0..1, resolved to 1/10000) or token counts (an int). They are chosen
    once, at prefill, per layer and KV head; every generated token is kept, unless `evict_every` says otherwise.

    `scorer`, `budget` and `quantizer` are names (`minikv_jax.methods.base`), of the library's schemes or of a user's.
    `options` are settings of these schemes' own, given as a mapping, kept as sorted pairs: `option` reads one.

    Two are equal where all fields have the same types and values: a count of 1 is not a share of 1.0.
    """

    name: str = "custom"
    citation: str = ""

    # Selection. "none" scores nothing: only the sinks and the recent window stay (all tokens if recent is 1.0).
    scorer: str = "none"
    heavy: float | int = 0.0  # budget of top-scored tokens ("heavy hitters", H2O)
    recent: float | int = 1.0  # budget of newest tokens
    sinks: int = 0  # leading tokens always kept, in full precision, beside the budgets (StreamingLLM)
    budget: str = "uniform"  # how `heavy` is spread over layers
    pyramid_beta: float = 7.0  # last layer's heavy share = mean / beta (MiniKV 7, PyramidKV 20)
    variance_cap: float = 2.0  # under a rule that reads scores ("variance") no layer gets over this multiple of `heavy`
    observation_window: int = 32  # "window" scorer: the last queries that vote (SnapKV)
    pooling: str = "max"  # "window" scorer: pooling of the votes along tokens
    pooling_kernel: int = 7
    evict_every: int | None = (
        None  # new tokens after which a layer is cut back to its budget; None: never (eviction.py)
    )

    # Storage. Bits of None keep the model's dtype, and then nothing is quantised.
    quantizer: str = "minmax"
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 16
    metadata_dtype: str = "float16"
    residual: str = "minikv"  # "minikv": the tail is packed whole when full; "kivi": the newest stay in full precision
    residual_length: int = 128

    options: Mapping[str, Option] | tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        SCORERS.require(self.scorer)
        BUDGETS.require(self.budget)
        QUANTIZERS.require(self.quantizer)
        _require_choice("pooling", self.pooling, POOLINGS)
        _require_choice("metadata_dtype", self.metadata_dtype, METADATA_DTYPES)
        _require_choice("residual", self.residual, RESIDUAL_RULES)
        _require_choice("group_size", self.group_size, GROUP_SIZES)
        bits = QUANTIZERS[self.quantizer].bits
        for name in ("k_bits", "v_bits"):
            _require_choice(f"quantizer={self.quantizer!r}: {name}", getattr(self, name), (None, *bits))
        if self.k_bits is None and self.quantizer != "minmax":
            raise ValueError(f"quantizer={self.quantizer!r} needs k_bits and v_bits, of {', '.join(map(str, bits))}")
        if (self.k_bits is None) != (self.v_bits is None):
            raise ValueError(f"k_bits={self.k_bits}, v_bits={self.v_bits}: quantise both K and V or neither")
        for name in ("heavy", "recent"):
            object.__setattr__(self, name, _budget(name, getattr(self, name)))
        if isinstance(self.heavy, float) and isinstance(self.recent, float) and self.heavy + self.recent > 1:
            raise ValueError(
                f"heavy={self.heavy} + recent={self.recent} is over 1: shares of the prompt may not sum over 1"
            )
        if self.heavy > 0 and self.scorer == "none":
            raise ValueError(f"heavy={self.heavy} needs a scorer: one of {', '.join(SCORERS)}, not 'none'")
        for name, least in (("sinks", 0), ("observation_window", 1), ("pooling_kernel", 1), ("residual_length", 1)):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least))
        if self.pooling_kernel % 2 == 0:
            raise ValueError(f"pooling_kernel={self.pooling_kernel}: expected an odd number")
        if self.evict_every is not None:
            object.__setattr__(self, "evict_every", checks.integer("evict_every", self.evict_every, 1))
            _check_eviction(self)
        for name in ("pyramid_beta", "variance_cap"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number >= 1")
        object.__setattr__(self, "options", _sorted_options(self))
        if self.quantized and MAX_BLOCK % self.packing_block:
            raise ValueError(
                f"quantizer={self.quantizer!r} has block={self.packing_block}: expected a divisor of {MAX_BLOCK}"
            )
        if self.quantized and self.residual_length % self.packing_block:
            raise ValueError(
                f"residual_length={self.residual_length}: expected a multiple of the packing block {self.packing_block}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheConfig) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[tuple[type, Any], ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple((type(value), value) for value in values)

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored as codes."""
        return self.k_bits is not None

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever evicted."""
        return isinstance(self.recent, float) and self.recent == 1.0

    @property
    def packing_block(self) -> int:
        """Tokens that enter the packed region together; the method must quantise."""
        return QUANTIZERS[self.quantizer].block(self)

    @property
    def option_defaults(self) -> dict[str, Option]:
        """The settings of its schemes' own, with their defaults."""
        schemes = (SCORERS[self.scorer], BUDGETS[self.budget], QUANTIZERS[self.quantizer])
        return {name: value for scheme in schemes for name, value in scheme.options.items()}

    def option(self, name: str) -> Any:
        """The value of a scheme's own setting: what `options` says, or its default."""
        return dict(self.options).get(name, self.option_defaults[name])

    @property
    def flush_block(self) -> int:
        """Tokens that leave a full tail at once."""
        return self.residual_length if self.residual == "minikv" else self.packing_block

    @property
    def tail_keep(self) -> int:
        """Newest tokens that stay in full precision after a flush."""
        return 0 if self.residual == "minikv" else self.residual_length


def _check_eviction(config: CacheConfig) -> None:
    """Raises ValueError where tokens cannot leave the cache during generation."""
    every = f"evict_every={config.evict_every}"
    if config.quantized:
        raise ValueError(
            f"{every} with k_bits={config.k_bits}: only full-precision tokens can leave, those of a packed block share "
            "their metadata"
        )
    if config.keeps_all:
        raise ValueError(f"{every} with recent=1.0: there is no budget to cut back to")
    if config.heavy > 0 and SCORERS[config.scorer].update is None:
        able = ", ".join(name for name in SCORERS if SCORERS[name].update is not None)
        raise ValueError(
            f"{every} with scorer={config.scorer!r}: expected a scorer that goes on during generation ({able})"
        )


def _sorted_options(config: CacheConfig) -> tuple[tuple[str, Option], ...]:
    """`config.options`, a mapping or pairs, as sorted pairs. Raises ValueError naming what is unknown or mistyped."""
    defaults, given = config.option_defaults, dict(config.options)
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise ValueError(
                f"option {name}={value!r}: scorer={config.scorer!r}, budget={config.budget!r} and "
                f"quantizer={config.quantizer!r} have {known}"
            )
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"option {name}={value!r}: expected {kind.__name__}, as its default {defaults[name]!r}")
        given[name] = kind(value)  # equal options are of equal types
    return tuple(sorted(given.items()))


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices or isinstance(value, bool | float):  # which equal integers
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}")


def _budget(name: str, value: float | int) -> float | int:
    """A share or a count as Python's own type: numpy's compare as another method."""
    share, count = isinstance(value, float | np.floating), isinstance(value, int | np.integer)
    if isinstance(value, bool) or not (share or count) or value < 0 or (share and not value <= 1):
        raise ValueError(f"{name}={value!r}: expected a share (float in 0..1) or a token count (int >= 0)")
    return float(value) if share else int(value)


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
        _require_choice("rope_type", self.rope_type, ("linear", "llama3", "factors"))
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
        _require_choice("model_type", self.model_type, MODEL_TYPES)
        _require_choice("hidden_act", self.hidden_act, ACTIVATIONS)
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
        _require_choice("layer_types entry", kind, LAYER_TYPES)
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
    _require_choice("model_type", model_type, MODEL_TYPES)
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
    _require_choice("rope_type", rope_type, ROPE_TYPES)
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
