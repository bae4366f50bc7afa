"""Foresight: chooses tokens and refits values for queries that are to come (minikv_jax; docs/results.md)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.turned import AHEAD, turned_votes
from minikv_jax.methods.votes import check_odd, pool, ranks


@register_scorer("foresight")
class Foresight(Scorer):
    """Keeps the first choices of three votes: of the last few queries, of more of them, and of turned ones.

    A token's score is the best of its ranks in the three, negated; a vote is a root mean square of weights, as of
    `rms-votes`. The last few queries want what a question asks for, more so if they were drafted (`Method.lookahead`).
    Queries of the whole prompt, turned to just after it, want what its continuation will use.

    Attributes:
      newest: number of last queries in the first vote.
      pooling_kernel: odd number of tokens over which the first vote is max-pooled, which keeps a number whole.
      observation_window: number of last queries in the second vote.
      turned: number of evenly spaced queries in the third vote.
      ahead: their new position, counted from the first new token, which has 0.

    Raises:
      ValueError: a value out of range, an even `pooling_kernel`, or `LayerInputs.frequencies` is None.
    """

    vote_power: ClassVar[int] = 2

    newest: int = setting(default=32, at_least=1, at_most=MAX_WINDOW)
    pooling_kernel: int = setting(default=1, at_least=1, at_most=4095)
    observation_window: int = setting(default=64, at_least=1, at_most=MAX_WINDOW)
    turned: int = setting(default=128, at_least=1, at_most=1024)
    ahead: int = setting(default=AHEAD, at_least=0, at_most=MAX_WINDOW)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd(self.pooling_kernel)

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (self.newest, self.observation_window)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        ahead, (last, more) = turned_votes(inputs, self.turned, self.ahead, power=2), inputs.votes
        last, more, ahead = ranks(pool(last, inputs.lengths, "max", self.pooling_kernel), more, ahead)
        return -jnp.minimum(jnp.minimum(last, more), ahead).astype(jnp.float32)


# Why these settings: docs/lab/2026-11-low-bytes.md.
QUARTER = register_method(
    Method(
        name="foresight-quarter",
        citation="minikv_jax: 8 % by three votes + the newest 32, values refitted, 32 drafted tokens, 4 bits; a "
        "quarter of minikv's bytes from 4,096 tokens on, in 16 bits with up to 120 new tokens",
        scorer=Foresight(pooling_kernel=31),
        heavy=0.08,
        recent=32,
        sinks=4,
        quantizer=MinMax(k_bits=4, v_bits=4, group_size=32, metadata_dtype="float8_e4m3fn"),
        tail=Tail(length=32),
        refit=Ridge(queries=64, turned=32),
        lookahead=32,
    )
)
register_method(
    dataclasses.replace(
        QUARTER,
        name="foresight-eighth",
        citation="minikv_jax: as foresight-quarter, 3.22 %; an eighth of minikv's bytes from 8,192 tokens on, "
        "in 16 bits with up to 120 new tokens",
        heavy=0.0322,
    )
)
