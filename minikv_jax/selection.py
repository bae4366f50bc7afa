"""Which prompt tokens a layer keeps: scorers, layer budgets, and the choice itself (MiniKV section 3.1, H2O, SnapKV).

A choice is made once per prompt, per layer, row and KV head. Kept are the first `sinks` tokens, the newest `recent`
tokens and the `heavy` top-scored tokens of the middle; ties go to the earlier token, and kept tokens stay in order of
position. Shares of the prompt are integers in 1/10000, so that a static capacity and a traced count never disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.config import CacheConfig

_UNIT = 10000  # shares are multiples of 1/_UNIT


class ScorerInputs(NamedTuple):
    """What a scorer may read of one layer's prefill. RoPE is already applied; rows are right-padded to `T`."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    lengths: Int[Array, "B"]
    column_sums: Float[Array, "B K T"] | None
    window: int | None  # the layer's sliding window


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A score per key: `score(inputs, config) -> float32 [B, K, T]`, higher is kept first."""

    score: Callable[[ScorerInputs, CacheConfig], Array]
    needs_column_sums: bool = False


def cumulative_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Column sums of the causal softmax map over all queries of the KV head's group (H2O eq. 2; MiniKV section 3.1)."""
    del config
    assert inputs.column_sums is not None
    return inputs.column_sums


def window_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Votes of the last `observation_window` queries, pooled along tokens (SnapKV section 4)."""
    votes = _window_votes(inputs, config.observation_window)
    positions = jnp.arange(votes.shape[-1])
    valid = positions < inputs.lengths[:, None, None]
    reach = config.pooling_kernel // 2
    dims, padding = (1, 1, config.pooling_kernel), ((0, 0), (0, 0), (reach, reach))
    if config.pooling == "max":
        votes = jnp.where(valid, votes, -jnp.inf)
        pooled = lax.reduce_window(votes, -jnp.inf, lax.max, dims, (1, 1, 1), padding)
    else:
        votes = jnp.where(valid, votes, 0.0)
        pooled = lax.reduce_window(votes, 0.0, lax.add, dims, (1, 1, 1), padding) / config.pooling_kernel
    return jnp.where(valid, pooled, 0.0)


def _window_votes(inputs: ScorerInputs, size: int) -> Array:
    q, k, _, lengths, _, window = inputs
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    positions = lengths[:, None] - size + jnp.arange(size)  # [B, w], negative where the row is shorter
    rows = jnp.take_along_axis(q, jnp.maximum(positions, 0)[:, :, None, None], axis=1)
    rows = rows.reshape(batch, size, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bwkgh,bskh->bkgws", rows, k, preferred_element_type=jnp.float32, precision="highest")
    keys = jnp.arange(tokens)
    seen = keys <= positions[:, :, None]  # [B, w, T]
    if window is not None:
        seen &= keys > positions[:, :, None] - window
    logits = jnp.where(seen[:, None, None], logits * dim**-0.5, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total == 0, 1.0, total), axis=(2, 3))  # [B, K, T]


def no_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """All tokens score alike: position alone decides (StreamingLLM, or no eviction at all)."""
    del config
    batch, tokens, kv_heads, _ = inputs.k.shape
    return jnp.zeros((batch, kv_heads, tokens), jnp.float32)


SCORERS: dict[str, Scorer] = {
    "none": Scorer(no_scores),
    "cumulative": Scorer(cumulative_scores, needs_column_sums=True),
    "window": Scorer(window_scores),
}


Length = TypeVar("Length", int, Array)


def budget_tokens(budget: float | int, length: Length) -> Length:
    """Tokens that a budget grants a row of `length`: `floor(length * share)`, or the count itself if the row has it."""
    if isinstance(budget, int):
        return min(budget, length) if isinstance(length, int) else jnp.minimum(budget, length)
    share = round(budget * _UNIT)
    return length // _UNIT * share + length % _UNIT * share // _UNIT  # exact without overflowing 32 bits


def layer_budgets(config: CacheConfig, num_layers: int) -> tuple[float | int, ...]:
    """The `heavy` budget of each layer; their sum is `num_layers * heavy` as far as the layers have room for it.

    "uniform" gives each layer the same. "pyramid" falls linearly from the first layer to the last, which gets
    `heavy / beta`; a layer's share is at most `1 - recent`, and what that cuts off goes to the layers with room
    (MiniKV section 3.1, PyramidKV section 3.2). "variance" decides at run time (`variance_budgets`); here it returns
    what each layer can get at most.
    """
    unit = 1 if isinstance(config.heavy, int) else _UNIT
    mean = config.heavy if isinstance(config.heavy, int) else round(config.heavy * _UNIT)
    most = _most(config)
    if config.budget == "pyramid" and num_layers > 1:
        last = mean / config.pyramid_beta
        first = 2 * mean - last
        wanted = [first + (last - first) * layer / (num_layers - 1) for layer in range(num_layers)]
        units = _round_to_sum(_clamp_to_sum(wanted, most), mean * num_layers)
    elif config.budget == "variance":
        units = [int(min(mean * config.variance_cap, most))] * num_layers
    else:
        units = [mean] * num_layers
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


def variance_budgets(
    scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"], config: CacheConfig
) -> Int[Array, "L B"]:
    """Heavy tokens per layer and row where layers whose scores are spread out get more (MiniKV section 3.1).

    The paper names the rule, not its formula. Here the weight of a layer is the mean over KV heads of
    `1 / (1 + Var[s / mean(s)])` over the row's valid tokens, which is the share of tokens that an even spread would
    need to carry the same second moment: near 1 for flat scores, near `1 / tokens` for a spike. A layer gets
    `heavy * L * weight / sum(weights)`, at most `variance_cap * heavy` (and `1 - recent`); the excess goes to the
    others in proportion. Token counts are rounded down.
    """
    counts = jnp.stack([_spread(layer, lengths) for layer in scores])  # [L, B]
    mean = budget_tokens(config.heavy, lengths).astype(jnp.float32)  # [B]
    most = budget_tokens(layer_budgets(config, len(scores))[0], lengths).astype(jnp.float32)
    total = mean * len(scores)
    granted = jnp.zeros_like(counts)
    for _ in scores:  # water filling: at least one layer reaches its cap in each round, or nothing is left
        open_weight = jnp.where(granted < most, counts, 0.0)
        left = total - granted.sum(axis=0)
        granted = jnp.minimum(granted + left * open_weight / jnp.maximum(open_weight.sum(axis=0), 1e-30), most)
    return jnp.floor(granted + 1e-3).astype(jnp.int32)


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
    rank = jnp.where(forced[:, None], jnp.inf, jnp.where(in_view[:, None], scores, -jnp.inf))
    _, order = lax.top_k(rank, capacity)  # equal elements come in order of position
    count = sinks + recent + heavy
    order = jnp.where(jnp.arange(capacity) < count[:, None, None], order, tokens)
    return Kept(jnp.sort(order, axis=-1), count)


def kept_capacity(config: CacheConfig, heavy: float | int, tokens: int, window: int | None = None) -> int:
    """The most tokens that a row of at most `tokens` keeps under `heavy`, sinks included."""
    kept = config.sinks + budget_tokens(config.recent, tokens) + budget_tokens(heavy, tokens)
    return min(kept, tokens if window is None else min(tokens, window - 1))
