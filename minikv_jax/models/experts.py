"""`Experts`: the shape of a mixture of experts, and how its router chooses. `Stack`: how files store its weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from minikv_jax import schemas
from minikv_jax.models import bounds

Count = Annotated[int, Field(ge=1, le=1 << 16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Settings of the layers whose MLP is a mixture of experts.

    Attributes:
      count: experts of a layer, `E`.
      per_token: experts that a token goes through.
      intermediate_size: hidden channels of an expert.
      shared_size: hidden channels of the expert that every token goes through; 0 if there is none.
      dense_layers: numbers of the layers with a plain MLP of `ModelConfig.intermediate_size` channels.
      scoring: what the router makes of its logits: their "softmax", their "sigmoid", or the "softmax_of_chosen", over
        the logits of the chosen experts only.
      normalised: a token's weights are divided by their sum.
      scale: factor of the weights.
      groups, chosen_groups: experts come in `groups` of equal size; only those of the `chosen_groups` with the largest
        sum of their two best scores can be chosen (DeepSeek-V3, arXiv 2412.19437).
      router_bias: the router's logits have a bias.
      correction_bias: scores have a bias when experts are chosen, but not in the weights (DeepSeek-V3).
      bias: the experts' projections have biases.
      weighted_inputs: the weight multiplies an expert's input instead of its output (Llama 4).
      swiglu_limit: the hidden channels are `(up + 1) * gate * sigmoid(swiglu_alpha * gate)`, with `gate` at most this
        and `up` within plus and minus this (gpt-oss); None for `activation(gate) * up`.
      swiglu_alpha: see `swiglu_limit`.
    """

    count: Count
    per_token: Count
    intermediate_size: bounds.Width
    shared_size: bounds.WidthOrZero = 0
    dense_layers: bounds.LayerNumbers = ()
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: Count = 1
    chosen_groups: Count = 1
    router_bias: bool = False
    correction_bias: bool = False
    bias: bool = False
    weighted_inputs: bool = False
    swiglu_limit: Annotated[float, Field(gt=0)] | None = None
    swiglu_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError naming the first field whose value is not accepted."""
        schemas.check_fields(self)
        if self.per_token > self.count:
            raise ValueError(f"per_token={self.per_token} exceeds count={self.count} experts")
        if self.count % self.groups:
            raise ValueError(f"count={self.count} experts cannot be split into groups={self.groups} of equal size")
        if self.chosen_groups > self.groups:
            raise ValueError(f"chosen_groups={self.chosen_groups} exceeds groups={self.groups}")
        candidates = self.count // self.groups * self.chosen_groups
        if self.per_token > candidates:
            raise ValueError(f"per_token={self.per_token} exceeds the {candidates} experts of the chosen groups")

    def in_layer(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.dense_layers


@dataclasses.dataclass(frozen=True)
class Stack:
    """A rule that cuts a tensor `[E, ...]` into tensors of single experts.

    Attributes:
      pattern: a regular expression that must match the tensor's whole name.
      parts: names of an expert's tensors, with the groups of the match and "{expert}" filled in. Each gets an equal
        share of the rows.
      transposed: the matrices are `[in, out]`; tensors of single experts are `[out, in]`.
      alternating: the parts' rows take turns, instead of one part following the other.
    """

    pattern: str
    parts: tuple[str, ...]
    transposed: bool = False
    alternating: bool = False
