"""Which prompt tokens a layer keeps, given their scores: layer budgets, and the choice itself (MiniKV section 3.1).

A choice is made once per prompt, per layer, row and KV head. Kept are the first `sinks` tokens, the newest `recent`
tokens and the `heavy` top-scored tokens of the middle; ties go to the earlier token, and kept tokens stay in order of
position. Shares of the prompt are integers in 1/10000, so that a static capacity and a traced count never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.methods.base import BUDGETS, register_budget
from minikv_jax.methods.config import CacheConfig

_UNIT = 10000  # shares are multiples of 1/_UNIT


Length = TypeVar("Length", int, Array)


def budget_tokens(budget: float | int, length: Length) -> Length:
    """Tokens that a budget grants a row of `length`: `floor(length * share)`, or the count itself if the row has it."""
    if isinstance(budget, int):
        return min(budget, length) if isinstance(length, int) else jnp.minimum(budget, length)
    share = round(budget * _UNIT)
    return length // _UNIT * share + length % _UNIT * share // _UNIT  # exact without overflowing 32 bits


@register_budget("uniform")
def uniform_weights(config: CacheConfig, num_layers: int) -> list[float]:
    """Each layer the same."""
    del config
    return [1.0] * num_layers


@register_budget("pyramid")
def pyramid_weights(config: CacheConfig, num_layers: int) -> list[float]:
    """A linear fall from the first layer to the last, which gets `heavy / pyramid_beta` (PyramidKV section 3.2)."""
    last = 1 / config.pyramid_beta
    first = 2 - last
    return [first + (last - first) * layer / max(num_layers - 1, 1) for layer in range(num_layers)]


def layer_budgets(config: CacheConfig, num_layers: int) -> tuple[float | int, ...]:
    """The `heavy` budget of each layer; their sum is `num_layers * heavy` as far as the layers have room for it.

    Layers get it in proportion to the weights of the rule `config.budget`. A layer's share is at most `1 - recent`, and
    what that cuts off goes to the layers with room (MiniKV section 3.1). A rule that reads scores decides at run time
    (`budgets_from_scores`); here each layer gets what it can have at most.
    """
    unit = 1 if isinstance(config.heavy, int) else _UNIT
    mean = config.heavy if isinstance(config.heavy, int) else round(config.heavy * _UNIT)
    most = _most(config)
    rule = BUDGETS[config.budget]
    if rule.needs_scores:
        units = [int(min(mean * config.variance_cap, most))] * num_layers
    else:
        weights = rule.weights(config, num_layers)
        wanted = [mean * num_layers * float(weight) / float(sum(weights)) for weight in weights]
        units = _round_to_sum(_clamp_to_sum(wanted, most), mean * num_layers)
    return tuple(units) if unit == 1 else tuple(value / unit for value in units)


def _most(config: CacheConfig) -> float | int:
    """The largest heavy budget a layer can use, in shares of 1/10000 or tokens."""
    if isinstance(config.heavy, int):
        return float("inf")
    return _UNIT - (round(config.recent * _UNIT) if isinstance(config.recent, float) else 0)


def _clamp_to_sum(wanted: Sequence[float | int], most: float | int) -> list[float | int]:
    """Clamps to `most` and gives the excess, in proportion, to those below it."""
    values = list(wanted)
    for _ in wanted:
        excess = sum(max(value - most, 0.0) for value in values)
        room = [i for i, value in enumerate(values) if value < most]
        values = [min(value, most) for value in values]
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


def granted(budget: float | int, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
    """A budget's tokens per row, not cut off at the row's length."""
    return jnp.full_like(lengths, budget) if isinstance(budget, int) else budget_tokens(budget, lengths)


@register_budget("variance", needs_scores=True)
def variance_weights(
    config: CacheConfig, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]
) -> Float[Array, "L B"]:
    """Layers whose scores are spread out get more (MiniKV section 3.1).

    The paper names the rule, not its formula. Here the weight of a layer is the mean over KV heads of
    `1 / (1 + Var[s / mean(s)])` over the row's valid tokens, which is the share of tokens that an even spread would
    need to carry the same second moment: near 1 for flat scores, near `1 / tokens` for a spike.
    """
    del config
    return jnp.stack([_spread(layer, lengths) for layer in scores])


def budgets_from_scores(
    scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"], config: CacheConfig
) -> Int[Array, "L B"]:
    """Heavy tokens per layer and row under a rule that reads scores.

    A layer gets `heavy * L * weight / sum(weights)`, at most `variance_cap * heavy` (and `1 - recent`); the excess goes
    to the others in proportion. Token counts are rounded down.
    """
    weights = BUDGETS[config.budget].weights(config, scores, lengths)  # [L, B]
    weights = jnp.where((weights > 0) & jnp.isfinite(weights), weights, 0.0)  # scores may have been NaN
    # Rows that go on evicting grow up to a count that exceeds their prompt.
    tokens = budget_tokens if config.evict_every is None else granted
    mean = tokens(config.heavy, lengths).astype(jnp.float32)  # [B]
    most = tokens(layer_budgets(config, len(scores))[0], lengths).astype(jnp.float32)
    total = mean * len(scores)
    given = jnp.zeros_like(weights)
    for _ in scores:  # water filling: at least one layer reaches its cap in each round, or nothing is left
        open_weight = jnp.where(given < most, weights, 0.0)
        left = total - given.sum(axis=0)
        given = jnp.minimum(given + left * open_weight / jnp.maximum(open_weight.sum(axis=0), 1e-30), most)
    return jnp.floor(given + 1e-3).astype(jnp.int32)


def _spread(scores: Array, lengths: Array) -> Array:
    valid = jnp.arange(scores.shape[-1]) < lengths[:, None, None]
    scores = jnp.where(valid, scores, 0.0)
    first, second = scores.sum(axis=-1), (scores**2).sum(axis=-1)
    return jnp.mean(first**2 / jnp.where(second == 0, 1.0, second) / lengths[:, None], axis=-1)


class Kept(NamedTuple):
    """The chosen tokens: `positions[b, k, :tokens[b]]` ascending, then `T` (one past the end) as filler."""

    positions: Int[Array, "B K M"]
    tokens: Int[Array, "B"]


def select_tokens(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    config: CacheConfig,
    capacity: int,
    window: int | None = None,
) -> Kept:
    """Keeps the sinks, the newest tokens and the top-scored tokens between them.

    Args:
      scores: higher is kept first; ties go to the lower position.
      lengths: valid tokens per row.
      heavy: top-scored tokens per row.
      capacity: `M`, at least what any row keeps (`kept_capacity`).
      window: with a sliding window only the last `window - 1` tokens can still be seen, so older ones are not kept.
    """
    tokens = scores.shape[-1]
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window + 1, 0)
    visible = lengths - first
    sinks = jnp.minimum(config.sinks, visible) if window is None else jnp.clip(config.sinks - first, 0, visible)
    recent = jnp.minimum(budget_tokens(config.recent, lengths), visible - sinks)
    heavy = jnp.minimum(heavy, visible - sinks - recent)
    positions = jnp.arange(tokens)
    in_view = (positions >= first[:, None]) & (positions < lengths[:, None])  # [B, T]
    forced = in_view & ((positions < (first + sinks)[:, None]) | (positions >= (lengths - recent)[:, None]))
    _, order = lax.top_k(rank(scores, forced, in_view), capacity)  # equal elements come in order of position
    count = sinks + recent + heavy
    order = jnp.where(jnp.arange(capacity) < count[:, None, None], order, tokens)
    return Kept(jnp.sort(order, axis=-1), count)


def rank(scores: Float[Array, "B K C"], forced: Bool[Array, "B C"], there: Bool[Array, "B C"]) -> Float[Array, "B K C"]:
    """What the choice sorts by: `forced` tokens first, then the scores, last what is not `there`.

    An infinite score stays between these, and NaN is the lowest of scores: neither displaces a forced token.
    """
    most = jnp.finfo(scores.dtype).max
    scores = jnp.nan_to_num(scores, nan=-most, posinf=most, neginf=-most)
    return jnp.where(there[:, None], jnp.where(forced[:, None], jnp.inf, scores), -jnp.inf)


def kept_capacity(config: CacheConfig, heavy: float | int, tokens: int, window: int | None = None) -> int:
    """The most tokens that a row of at most `tokens` keeps under `heavy`, sinks included."""
    kept = config.sinks + budget_tokens(config.recent, tokens) + budget_tokens(heavy, tokens)
    return min(kept, tokens if window is None else min(tokens, window - 1))
