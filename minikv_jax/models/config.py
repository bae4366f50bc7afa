"""`ModelConfig`: the validated shape of a model, read from files by `huggingface`, `gguf` and `checkpoint`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from minikv_jax import schemas
from minikv_jax.models import bounds, families
from minikv_jax.models.design import Design, Latent
from minikv_jax.models.experts import Experts
from minikv_jax.models.family import Family
from minikv_jax.models.windows import Chunk, Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies `theta ** (-2i / H)` for longer contexts.

    Attributes:
      rope_type: "linear" divides all frequencies by `factor`. "llama3" and "yarn" (arXiv 2309.00071) divide the slow
        ones by `factor`, keep the fast ones and blend in between, "llama3" in the number of turns (Llama 3.1, arXiv
        2407.21783) and "yarn" in the number of the frequency. "factors" divides frequency `i` by `factors[i]`, which is
        how a GGUF file stores "llama3"; "longrope" (arXiv 2402.13753) does so with `long_factors` instead if the
        sequence is longer than the original context. "dynamic" raises the base with the length of a longer sequence.
      factor: the divisor of "linear", "llama3" and "yarn"; the growth of "dynamic".
      low_freq_factor: "llama3" scales fully what turns fewer times than this over the original context.
      high_freq_factor: "llama3" leaves unchanged what turns more often than this.
      original_max_position_embeddings: the original context, in tokens.
      factors: a divisor for each frequency of "factors" and "longrope", empty otherwise.
      long_factors: as `factors`, for "longrope" beyond the original context.
      attention_factor: queries and keys are multiplied by this as they are rotated ("yarn", "longrope").
      first_blended, last_blended: "yarn" keeps the frequencies up to the first number, divides those from the second on
        and blends in between.

    Raises:
      ValueError: a value is not accepted. The message names the first such field.
    """

    rope_type: Literal["linear", "llama3", "factors", "yarn", "longrope", "dynamic"]
    factor: bounds.RopeFactor = 1.0
    low_freq_factor: bounds.RopeFactor = 1.0
    high_freq_factor: bounds.RopeFactor = 4.0
    original_max_position_embeddings: bounds.Positions = 8192
    factors: bounds.RopeFactors = ()
    long_factors: bounds.RopeFactors = ()
    attention_factor: bounds.RopeFactor = 1.0
    first_blended: bounds.Blend = 0.0
    last_blended: bounds.Blend = 1.0

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.rope_type in ("dynamic", "longrope")

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        schemas.check_fields(self)
        if self.rope_type == "llama3" and self.low_freq_factor > self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must not exceed high_freq_factor={self.high_freq_factor}"
            )
        if self.rope_type == "yarn" and not self.first_blended < self.last_blended:
            raise ValueError(f"first_blended={self.first_blended} must be below last_blended={self.last_blended}")


class Rope(NamedTuple):
    """How a layer rotates queries and keys (Su et al., arXiv 2104.09864). The numbers of channels are even.

    Attributes:
      head_dim: channels per head, `H`.
      rotated: leading channels that are rotated; 0 if the layer has no RoPE. See `rotary.channel_order`.
      theta: base of the frequencies `theta ** (-2i / rotated)`.
      scaling: their scaling, if any.
      query_tuning: how the queries of a layer without RoPE grow with their position (`ModelConfig.query_tuning`).
    """

    head_dim: int
    rotated: int
    theta: float
    scaling: RopeScaling | None
    query_tuning: tuple[int, float] | None = None

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.scaling is not None and self.scaling.by_length


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
      hidden_act: activation of the MLP, a key of `mlp.ACTIVATIONS`.
      max_position_embeddings: the longest context, in tokens.
      rms_norm_eps: epsilon of the norms.
      rope_theta: base of the rotary frequencies.
      rope_scaling: their scaling, if any.
      local_rope_theta: base in the layers with a sliding window, where nothing scales the frequencies; None if these
        layers rotate as the others.
      rotary_dim: channels of a head that are rotated, an even number; None for all.
      unrotated_layers: numbers of the layers without RoPE.
      attention_bias: biases in the q, k, v and o projections.
      mlp_bias: biases in the MLP.
      tie_word_embeddings: the embedding also serves as the output projection.
      sliding_window: keys that a query sees, itself included; None for all of them.
      layer_types: "full_attention", "sliding_attention" or "chunked_attention" for each layer. None: `sliding_window`
        applies to all layers.
      attention_chunk_size: tokens of a chunk in the layers with chunked attention (`windows.Chunk`).
      query_tuning: `(length, strength)`: in the layers without RoPE, queries at position `t` are multiplied by
        `1 + strength * log(1 + (t + 1) // length)` (Llama 4, after arXiv 2501.19399); None: they are not.
      eos_token_ids: tokens that end a text.
      embedding_multiplier: factor of the embeddings.
      attention_multiplier: factor of the attention logits; None for `head_dim ** -0.5`.
      residual_multiplier: factor of what attention and MLP add to the residual stream.
      logit_multiplier: factor of the output logits.
      attn_logit_softcapping: attention logits `x` become `c tanh(x / c)` (Gemma 2, arXiv 2408.00118); None: unchanged.
      final_logit_softcapping: the same of the output logits.
      experts: the mixture of experts in place of the MLP; None if there is none.
      latent: sizes of multi-head latent attention; None for plain attention.
      own_design: how the layers are built, if it is not the family's design.

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
    layer_types: bounds.AnyLayerTypes | None = None
    eos_token_ids: bounds.Tokens = ()  # any of these ends a text
    local_rope_theta: bounds.RopeBase | None = None
    rotary_dim: bounds.Width | None = None
    unrotated_layers: bounds.LayerNumbers = ()
    attention_chunk_size: bounds.Positions | None = None
    query_tuning: bounds.QueryTuning | None = None
    embedding_multiplier: bounds.Multiplier = 1.0
    attention_multiplier: bounds.Multiplier | None = None
    residual_multiplier: bounds.Multiplier = 1.0
    logit_multiplier: bounds.Multiplier = 1.0
    attn_logit_softcapping: bounds.Multiplier | None = None
    final_logit_softcapping: bounds.Multiplier | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    own_design: Design | None = None

    @property
    def family(self) -> Family:
        """The model family, which describes its architecture and its files."""
        return families.get(self.model_type)

    @property
    def design(self) -> Design:
        """How the layers are built."""
        return self.own_design or self.family.design

    @property
    def qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.attention_bias or self.design.qkv_bias

    @property
    def rope_by_length(self) -> bool:
        """Whether rotary frequencies depend on the length of the sequence."""
        return self.rope_scaling is not None and self.rope_scaling.by_length

    @property
    def query_scale(self) -> float:
        """Factor of the queries: the ops divide logits by `sqrt(head_dim)`, and queries carry the rest of the scale."""
        return 1.0 if self.attention_multiplier is None else self.attention_multiplier * self.head_dim**0.5

    def rope(self, layer: int) -> Rope:
        """How a layer rotates its queries and keys."""
        if layer in self.unrotated_layers:
            return Rope(self.head_dim, 0, self.rope_theta, self.rope_scaling, self.query_tuning)
        rotated = self.rotary_dim or self.head_dim
        if self.local_rope_theta is not None and self.window(layer) is not None:
            return Rope(self.head_dim, rotated, self.local_rope_theta, None)
        return Rope(self.head_dim, rotated, self.rope_theta, self.rope_scaling)

    def window(self, layer: int) -> Window | None:
        """The sliding window of a layer in tokens, or its chunk; None if the layer sees all keys."""
        kind = "sliding_attention" if self.layer_types is None else self.layer_types[layer]
        if kind == "chunked_attention" and self.attention_chunk_size is not None:
            return Chunk(self.attention_chunk_size)
        return self.sliding_window if kind == "sliding_attention" else None

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        families.get(self.model_type)
        schemas.check_fields(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        for name, size in (("head_dim", self.head_dim), ("rotary_dim", self.rotary_dim or 0)):
            if size % 2:
                raise ValueError(f"{name}={size} must be even: the rotary embedding turns pairs of channels")
        _check_rope(self)
        if any(token >= self.vocab_size for token in self.eos_token_ids):
            raise ValueError(f"eos_token_ids={self.eos_token_ids} must lie in 0..{self.vocab_size - 1} (vocab_size)")
        _check_windows(self)
        _check_experts(self)
        _check_latent(self)

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
        for name, part in (
            ("rope_scaling", RopeScaling),
            ("experts", Experts),
            ("latent", Latent),
            ("own_design", Design),
        ):
            if isinstance(given := values.get(name), Mapping):
                fields = schemas.validate(schemas.of(part), given, source=f"{os.fspath(source)}: {name}")
                with schemas.naming(source):
                    values[name] = part(**dict(fields))
        fields = schemas.validate(schemas.of(cls), values, source=source)
        with schemas.naming(source):
            return cls(**dict(fields))


def _check_rope(config: ModelConfig) -> None:
    """Raises ValueError if rotary settings do not match the head size or the layers."""
    if (rotated := config.rotary_dim or 0) > config.head_dim:
        raise ValueError(f"rotary_dim={rotated} exceeds head_dim={config.head_dim}")
    if any(layer >= config.num_hidden_layers for layer in config.unrotated_layers):
        raise ValueError(
            f"unrotated_layers={config.unrotated_layers} must lie in 0..{config.num_hidden_layers - 1} "
            "(num_hidden_layers)"
        )
    if (scaling := config.rope_scaling) is None:
        return
    kind, pairs = scaling.rope_type, (rotated or config.head_dim) // 2
    for name, kinds in (("factors", ("factors", "longrope")), ("long_factors", ("longrope",))):
        count, needed = len(getattr(scaling, name)), pairs if kind in kinds else 0
        if count != needed:
            size = f"head_dim={config.head_dim}" if config.rotary_dim is None else f"rotary_dim={rotated}"
            raise ValueError(f"rope_scaling of type {kind!r} has {count} {name}, {size} needs {needed}")


def _check_windows(config: ModelConfig) -> None:
    """Raises ValueError if `sliding_window` or `attention_chunk_size` contradicts `layer_types`."""
    if config.layer_types is None:
        if config.attention_chunk_size is not None:
            raise ValueError(
                f"attention_chunk_size={config.attention_chunk_size} needs layer_types with chunked_attention layers"
            )
        return
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.layer_types)} layers, num_hidden_layers={config.num_hidden_layers}"
        )
    if ("chunked_attention" in config.layer_types) != (config.attention_chunk_size is not None):
        raise ValueError(
            f"attention_chunk_size={config.attention_chunk_size} disagrees with layer_types={config.layer_types}: "
            "a chunk size needs chunked_attention layers, and they need a chunk size"
        )
    if ("sliding_attention" in config.layer_types) != (config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window} disagrees with layer_types={config.layer_types}: "
            "a window needs sliding_attention layers, and they need a window"
        )


def _check_experts(config: ModelConfig) -> None:
    """Raises ValueError if `experts` names a dense layer that does not exist."""
    dense = () if config.experts is None else config.experts.dense_layers
    if any(layer >= config.num_hidden_layers for layer in dense):
        last = config.num_hidden_layers - 1
        raise ValueError(f"experts.dense_layers={dense} must lie in 0..{last} (num_hidden_layers)")


def _check_latent(config: ModelConfig) -> None:
    """Raises ValueError if the heads do not suit multi-head latent attention."""
    if config.latent is None:
        return
    if config.latent.value_dim > config.head_dim:
        raise ValueError(f"latent.value_dim={config.latent.value_dim} exceeds head_dim={config.head_dim}")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads} must equal num_attention_heads="
            f"{config.num_attention_heads} in latent attention"
        )
