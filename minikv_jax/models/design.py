"""`Design`: how the layers of a model are built. Families differ from Llama by these values."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from minikv_jax import schemas
from minikv_jax.models import bounds

NormKind = Literal["rms_norm", "rms_norm_1p", "layer_norm", "layer_norm_1p", "layer_norm_no_bias", "layer_norm_plain"]


class NormForm(NamedTuple):
    """What a norm computes around the division by the root mean square.

    Attributes:
      centred: it subtracts the mean first.
      weighted: it multiplies by a weight.
      plus_one: it multiplies by one plus the weight.
      biased: it adds a bias.
    """

    centred: bool = False
    weighted: bool = True
    plus_one: bool = False
    biased: bool = False


NORM_FORMS: dict[NormKind, NormForm] = {
    "rms_norm": NormForm(),
    "rms_norm_1p": NormForm(plus_one=True),
    "layer_norm": NormForm(centred=True, biased=True),
    "layer_norm_1p": NormForm(centred=True, plus_one=True, biased=True),
    "layer_norm_no_bias": NormForm(centred=True),
    "layer_norm_plain": NormForm(centred=True, weighted=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """How a model's layers are built; the defaults are Llama's.

    Attributes:
      norm: kind of all norms, a key of `NORM_FORMS`.
      pre_norms: attention and MLP read their input through a norm.
      post_norms: the outputs of attention and MLP pass through a norm before they are added.
      parallel: attention and MLP read the same normalised input and are added together.
      qkv_bias: the q, k and v projections have biases, whatever `ModelConfig.attention_bias` says, and o has none.
      qk_norm: norms of queries and keys: over each head ("head"), over each head with weights of its own ("each_head"),
        over all heads at once ("projection"), over each head without a weight and only in layers with RoPE ("rotated"),
        or none.
      qk_norm_after_rope: they come after the rotation.
      attention_sinks: every query head has a learnt logit in the softmax's denominator (gpt-oss, arXiv 2508.10925).
      gated_mlp: the MLP multiplies its activation by a second projection.
      head_bias: the output projection has a bias.

    Raises:
      ValueError: a value is not accepted. The message names the first such field.
    """

    norm: NormKind = "rms_norm"
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    qkv_bias: bool = False
    qk_norm: Literal["head", "each_head", "projection", "rotated"] | None = None
    qk_norm_after_rope: bool = False
    attention_sinks: bool = False
    gated_mlp: bool = True
    head_bias: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        schemas.check_fields(self)

    @property
    def norm_form(self) -> NormForm:
        """What the norms compute."""
        return NORM_FORMS[self.norm]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
      query_rank: channels of the queries' latent; 0 if queries are projected from the layer's input.
      kv_rank: channels of the latent of keys and values.
      value_dim: channels per head of the values, at most those of the keys (`ModelConfig.head_dim`).
      interleaved: checkpoints rotate neighbouring channels, not the halves of the rotated ones.

    Raises:
      ValueError: a value is not accepted. The message names the first such field.
    """

    query_rank: bounds.WidthOrZero
    kv_rank: bounds.Width
    value_dim: bounds.Width
    interleaved: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        schemas.check_fields(self)


LLAMA = Design()
