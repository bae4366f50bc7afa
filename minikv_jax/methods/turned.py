"""Turned queries: the prompt's queries, as if they stood just after it (docs/lab/2026-11-low-bytes.md)."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.registry import register_scorer
from minikv_jax.methods.votes import causal_weights, gather_votes, ranks
from minikv_jax.models.rotary import rotate

AHEAD = 16  # default position of turned queries, counted from the first new token


def turned_queries(
    inputs: LayerInputs, numbers: Int[Array, "W"], count: int, ahead: int
) -> tuple[Float[Array, "B W N H"], Int[Array, "B W"]]:
    """Turns some of `count` evenly spaced queries of each row to one position after it.

    RoPE is a rotation, so that a query can be turned to any position. The queries of a whole text resemble those of its
    continuation more than its last ones do, which are of one sentence.

    Args:
      inputs: the prompt. Its `frequencies` are needed.
      numbers: which of the queries, 0 for the newest. From `count` on there are none.
      count: number of queries. A row with fewer tokens repeats some.
      ahead: their new position, counted from the row's first new token, which has 0.

    Returns:
      The queries and their positions, -1 if there is none.

    Raises:
      ValueError: `LayerInputs.frequencies` is None.
    """
    if inputs.frequencies is None:
        raise ValueError("turned queries need the rotary frequencies")
    lengths = inputs.lengths[:, None]
    numbers = numbers[None]
    back = numbers * (lengths // count) + numbers * (lengths % count) // count  # exact within 32 bits
    chosen = jnp.maximum(lengths - 1 - back, 0)
    q = jnp.take_along_axis(inputs.q, chosen[:, :, None, None], axis=1)
    angles = (lengths + ahead - chosen)[..., None] * jnp.atleast_2d(inputs.frequencies)[:, None]
    return rotate(q, jnp.cos(angles), jnp.sin(angles)), jnp.where(numbers < count, lengths + ahead, -1)


def turned_votes(inputs: LayerInputs, count: int, ahead: int, power: int = 1) -> Float[Array, "B K T"]:
    """Sums the weights, to a power, that keys get from turned queries; float32, zero in the padding."""

    def weigh(numbers: Array, keys: Array, at: Array) -> Array:
        beyond = inputs.lengths[:, None, None] + ahead + 1  # no query sees the padding
        at = jnp.where(at < inputs.lengths[:, None, None], at, beyond)
        return causal_weights(inputs, *turned_queries(inputs, numbers, count, ahead), keys, at)

    return gather_votes(inputs, count, weigh, lambda votes, new: votes + jnp.sum(new**power, axis=(2, 3)))


@register_scorer("foresight")
class Foresight(Scorer):
    """Keeps the first choices of three votes: of the last few queries, of more of them, and of turned ones.

    A token's score is the best of its ranks in the three, negated; a vote is a root mean square of weights, as of
    `rms-votes`. The last few queries want what a question asks for, more so if they were drafted (`Method.lookahead`).
    Queries of the whole prompt, turned to just after it, want what its continuation will use.

    Attributes:
      newest: number of last queries in the first vote.
      observation_window: number of last queries in the second vote.
      turned: number of evenly spaced queries in the third vote.
      ahead: their new position, counted from the first new token, which has 0.

    Raises:
      ValueError: `LayerInputs.frequencies` is None.
    """

    vote_power: ClassVar[int] = 2

    newest: int = setting(default=32, at_least=1, at_most=MAX_WINDOW)
    observation_window: int = setting(default=64, at_least=1, at_most=MAX_WINDOW)
    turned: int = setting(default=128, at_least=1, at_most=1024)
    ahead: int = setting(default=AHEAD, at_least=0, at_most=MAX_WINDOW)

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (self.newest, self.observation_window)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        last, more, ahead = ranks(*inputs.votes, turned_votes(inputs, self.turned, self.ahead, power=2))
        return -jnp.minimum(jnp.minimum(last, more), ahead).astype(jnp.float32)
