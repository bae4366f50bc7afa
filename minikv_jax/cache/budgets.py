"""Heavy budgets of the layers: spreads the mean budget by the method's rule and clamps it to what a layer can use."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods import calls
from minikv_jax.methods.base import MAX_TOKENS, ScoredBudget
from minikv_jax.methods.method import SHARE_UNITS, Amount, Method, Share, Tokens


def layer_budgets(method: Method, num_layers: int) -> tuple[Amount, ...]:
    """Returns the `heavy` budget of each layer. Budgets sum to `num_layers * heavy` if the layers have room for it.

    Layers share the sum in proportion to the weights of the method's rule. A layer's share is at most `1 - recent`; the
    excess goes to layers with room (MiniKV section 3.1). A rule that reads scores decides at run time
    (`budgets_from_scores`); here each layer then gets the largest budget that it can have.
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
    """Largest heavy budget that a layer can use, in units of 1/10000 or in tokens."""
    if isinstance(method.heavy, Tokens):
        return MAX_TOKENS
    return SHARE_UNITS - (method.recent.units if isinstance(method.recent, Share) else 0)


def _clamp_to_sum(ideal: Sequence[float], limit: float | int) -> list[float | int]:
    """Clamps values to `limit` and gives the excess to those below it, in proportion."""
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
    """Rounds down, then gives the missing units to the largest remainders, earlier layers first."""
    floors = [int(value + 1e-9) for value in values]
    missing = min(total, round(sum(values))) - sum(floors)
    order = sorted(range(len(values)), key=lambda i: (floors[i] - values[i], i))
    for i in order[:missing]:
        floors[i] += 1
    return floors


def budgets_from_scores(
    method: Method, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]
) -> Int[Array, "L B"]:
    """Computes heavy tokens per layer and row for a rule that reads scores.

    A layer gets `heavy * L * weight / sum(weights)`, at most `cap * heavy` and `1 - recent`. The excess goes to the
    other layers in proportion. Token counts are rounded down.
    """
    assert isinstance(method.budget, ScoredBudget)
    weights = calls.scored_weights(method.budget, scores, lengths)
    weights = jnp.where((weights > 0) & jnp.isfinite(weights), weights, 0.0)  # scores may have been NaN
    mean, limit = (
        # With `evict_every`, a row grows up to a count that exceeds its prompt.
        (budget.tokens(lengths) if method.evict_every is None else budget.granted(lengths)).astype(jnp.float32)  # [B]
        for budget in (method.heavy, layer_budgets(method, len(scores))[0])
    )
    total = mean * len(scores)
    given = jnp.zeros_like(weights)
    for _ in scores:  # water filling: in each round a layer reaches its cap, or nothing is left
        open_weight = jnp.where(given < limit, weights, 0.0)
        left = total - given.sum(axis=0)
        given = jnp.minimum(given + left * open_weight / jnp.maximum(open_weight.sum(axis=0), 1e-30), limit)
    return jnp.floor(given + 1e-3).astype(jnp.int32)
