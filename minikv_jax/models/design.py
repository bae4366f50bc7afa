"""`Design`: how the layers of a model are built. Families differ from Llama by these values."""

from __future__ import annotations

import dataclasses
from typing import Literal

# "rms_norm" divides by the root mean square, "layer_norm" subtracts the mean first and adds a bias. "_1p" multiplies by
# one plus the weight, "_no_bias" leaves the bias out, "_plain" the weight too.
NormKind = Literal["rms_norm", "rms_norm_1p", "layer_norm", "layer_norm_1p", "layer_norm_no_bias", "layer_norm_plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """How a model's layers are built; the defaults are Llama's.

    Attributes:
      norm: kind of all norms.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
      query_rank: channels of the queries' latent; 0 if queries are projected from the layer's input.
      kv_rank: channels of the latent of keys and values.
      value_dim: channels per head of the values, at most those of the keys (`ModelConfig.head_dim`).
      interleaved: checkpoints rotate neighbouring channels, not the halves of the rotated ones.
    """

    query_rank: int
    kv_rank: int
    value_dim: int
    interleaved: bool = True


LLAMA = Design()
