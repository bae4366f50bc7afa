"""Attention matching (arXiv 2602.16284): scores tokens by the root mean square of their attention weights."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.registry import register_scorer


@register_scorer("rms-votes")
class RmsVotes(Scorer):
    """Root mean square of the weights that a key gets from the last queries ("highest attention", arXiv 2602.16284).

    A token that a few queries want very much scores higher than by the mean, SnapKV's vote. The paper reads reference
    queries made for the purpose; these are the prompt's own.

    Attributes:
      observation_window: number of last queries that vote.
    """

    vote_power: ClassVar[int] = 2

    observation_window: int = setting(default=64, at_least=1, at_most=MAX_WINDOW)

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (self.observation_window,)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        group = inputs.q.shape[2] // inputs.k.shape[2]
        count = group * jnp.minimum(inputs.lengths, self.observation_window)
        return jnp.sqrt(inputs.votes[0] / count[:, None, None])
