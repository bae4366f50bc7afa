"""Turned queries: the prompt's queries, as if they stood just after it (docs/lab/2026-11-low-bytes.md)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.votes import UNSEEN, causal_weights, gather_votes
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
        at = jnp.where(at < inputs.lengths[:, None, None], at, UNSEEN)
        return causal_weights(inputs, *turned_queries(inputs, numbers, count, ahead), keys, at)

    return gather_votes(inputs, count, weigh, lambda votes, new: votes + jnp.sum(new**power, axis=(2, 3)))
