"""What attention and scorers are given of a layer's prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from minikv_jax.models.windows import Window


class LayerInputs(NamedTuple):
    """One layer's prompt, as attention and scorers see it. RoPE is already applied; rows are right-padded to `T`.

    Attributes:
      q, k, v: queries, keys and values in the model's dtype. The padding may hold anything, including NaN.
      lengths: int32, valid tokens per row.
      column_sums: float32, sums of the causal softmax map over all queries and the query heads of a KV head; None
        unless the scorer needs them.
      window: sliding window of the layer in tokens, or its `Chunk`; None if every query sees all earlier keys.
      layer: number of the layer. Scorers get a traced int32 scalar, because layers of equal shapes may share a program.
      frequencies: float32 `[H/2]`, radians per position by which RoPE turned channels (i, i + H/2), 0 for unrotated
        ones; `[B, H/2]` if they differ by row; None if unknown.
      sinks: number of leading tokens that the method keeps whatever their scores.
      soft_cap: attention logits `x` became `soft_cap * tanh(x / soft_cap)`; None if they did not.
      sink_logits: logit per query head that the layer's softmax has beside the keys' (attention sinks of gpt-oss), in
        its denominator only; None if it has none.
      votes: for each of the scorer's `vote_windows`, float32 sums of the softmax map, to `vote_power`, over that many
        last queries of a row and the query heads of a KV head; zero in the padding.
      output_projection: the layer's matrix after attention: for each query head, a row for each of its values' first
        channels (all `H`, if values are not padded); None if unknown.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    lengths: Int[Array, "B"]
    column_sums: Float[Array, "B K T"] | None = None
    window: Window | None = None
    layer: Int[Array, ""] | int = 0
    frequencies: Float[Array, "*B F"] | None = None
    sinks: int = 0
    soft_cap: float | None = None
    sink_logits: Float[Array, "N"] | None = None
    votes: tuple[Float[Array, "B K T"], ...] = ()
    output_projection: Float[Array, "NV D"] | None = None

    @property
    def attention_options(self) -> dict[str, Any]:
        """The layer's options of the attention ops: window, soft cap and sink logits."""
        return {"window": self.window, "soft_cap": self.soft_cap, "sink_logits": self.sink_logits}


# For JAX, these are parts of the program; the others are its arrays.
_STATIC_INPUTS = ("window", "sinks", "soft_cap")


def _split_inputs(inputs: LayerInputs) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    arrays = inputs._replace(**dict.fromkeys(_STATIC_INPUTS))
    return tuple(arrays), tuple(getattr(inputs, name) for name in _STATIC_INPUTS)


def _join_inputs(static: tuple[Any, ...], arrays: tuple[Any, ...]) -> LayerInputs:
    return LayerInputs(*arrays)._replace(**dict(zip(_STATIC_INPUTS, static, strict=True)))


jax.tree_util.register_pytree_node(LayerInputs, _split_inputs, _join_inputs)
