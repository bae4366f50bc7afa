"""Heavy budgets of the layers: the mean budget spread by the method's rule, and clamped to what a layer can use."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods import calls
from minikv_jax.methods.base import MAX_TOKENS, ScoredBudget
from minikv_jax.methods.method import SHARE_UNITS, Amount, Method, Share, Tokens


def layer_budgets(method: Method, num_layers: int) -> tuple[Amount, ...]:
    """The `heavy` budget of each layer; their sum is `num_layers * heavy` as far as the layers have room for it.

    Layers get it in proportion to the weights of the method's rule. A layer's share is at most `1 - recent`, and what
    that cuts off goes to the layers with room (MiniKV section 3.1). A rule that reads scores decides at run time
    (`budgets_from_scores`); here each layer then gets the most that it can have.
    """
    mean = method.heavy.count if isinstance(method.heavy, Tokens) else method.heavy.units
    limit = _limit(method)
    if isinstance(method.budget, ScoredBudget):
        units = [int(min(mean * method.budget.cap, limit))] * num_layers
    else:
        weights = calls.layer_weights(method.budget, num_layers)
        ideal = [mean * num_layers * weight / sum(weights) for weight in weights]
        units = _round_to_sum(_clamp_to_sum(ideal, limit), mean * num_layers)
    return tuple(Tokens(n) if isinstance(method.heavy, Tokens) else Share(n / SHARE_UNITS) for n in units)


def _limit(method: Method) -> int:
    """The largest heavy budget a layer can use, in shares of 1/10000 or tokens."""
    if isinstance(method.heavy, Tokens):
        return MAX_TOKENS
    return SHARE_UNITS - (method.recent.units if isinstance(method.recent, Share) else 0)


def _clamp_to_sum(ideal: Sequence[float], limit: float | int) -> list[float | int]:
    """Clamps to `limit` and gives the excess, in proportion, to those below it."""
    values: list[float | int] = list(ideal)
    for _ in ideal:
        excess = sum(max(value - limit, 0.0) for value in values)
        room = [i for i, value in enumerate(values) if value < limit]
        values = [min(value, limit) for value in values]
        if excess < 1e-9 or not room:
            break
        free = sum(values[i] for i in room)
        for i in room:
            values[i] += excess * (values[i] / free if free else 1 / len(room))
    return values


def _round_to_sum(values: Sequence[float | int], total: int) -> list[int]:
    """Rounds down, then hands the missing units to the largest remainders (earlier layers first)."""
    floors = [int(value + 1e-9) for value in values]
    missing = min(total, round(sum(values))) - sum(floors)
    order = sorted(range(len(values)), key=lambda i: (floors[i] - values[i], i))
    for i in order[:missing]:
        floors[i] += 1
    return floors


def budgets_from_scores(
    method: Method, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]
) -> Int[Array, "L B"]:
    """Heavy tokens per layer and row under a rule that reads scores.

    A layer gets `heavy * L * weight / sum(weights)`, at most `cap * heavy` (and `1 - recent`); the excess goes to the
    others in proportion. Token counts are rounded down.
    """
    assert isinstance(method.budget, ScoredBudget)
    weights = calls.scored_weights(method.budget, scores, lengths)
    weights = jnp.where((weights > 0) & jnp.isfinite(weights), weights, 0.0)  # scores may have been NaN
    mean, limit = (
        # Rows that go on evicting grow up to a count that exceeds their prompt.
        (budget.tokens(lengths) if method.evict_every is None else budget.granted(lengths)).astype(jnp.float32)  # [B]
        for budget in (method.heavy, layer_budgets(method, len(scores))[0])
    )
    total = mean * len(scores)
    given = jnp.zeros_like(weights)
    for _ in scores:  # water filling: at least one layer reaches its cap in each round, or nothing is left
        open_weight = jnp.where(given < limit, weights, 0.0)
        left = total - given.sum(axis=0)
        given = jnp.minimum(given + left * open_weight / jnp.maximum(open_weight.sum(axis=0), 1e-30), limit)
    return jnp.floor(given + 1e-3).astype(jnp.int32)
