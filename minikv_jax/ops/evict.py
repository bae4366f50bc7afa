"""Eviction during generation: every `evict_every` tokens a layer drops what its budget does not hold.

The budget is that of the prompt: the first `sinks` tokens, the newest `recent` and the `heavy` top-scored of the
others, a share meaning a share of the prompt. A row grows by `evict_every` tokens over it and is then cut back, so a
layer's capacity does not depend on how much is generated. Scores go on where the prompt's ended, by the scorer's
`update`: under "cumulative", with `evict_every=1`, this is H2O (arXiv 2306.14048, algorithm 1).

Only full-precision tokens can leave: a packed block shares its metadata, and its layout, among tokens of any score.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import SCORERS
from minikv_jax.ops.select import Kept, budget_tokens, granted, rank

if TYPE_CHECKING:
    from minikv_jax.cache.state import LayerCache
    from minikv_jax.methods.config import CacheConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eviction:
    """What a layer needs to know to evict.

    Attributes:
      scores: of each tail slot, zero where it is empty; None where nothing is kept by score.
      heavy, recent: tokens per row that stay beside the sinks.
    """

    scores: Float[Array, "B K C"] | None
    heavy: Int[Array, "B"]
    recent: Int[Array, "B"]

    def budget(self, config: CacheConfig) -> Int[Array, "B"]:
        """Tokens per row that an eviction leaves."""
        return config.sinks + self.heavy + self.recent


def begin(
    scores: Float[Array, "B K T"],
    kept: Kept,
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    config: CacheConfig,
    capacity: int,
) -> Eviction:
    """The state after a prompt: the kept tokens' scores, and the budgets of the row.

    Args:
      scores: the prompt's.
      heavy: the layer's budget per row; a count may exceed the prompt, which then grows up to it.
      capacity: `C`, tail slots.
    """
    recent = granted(config.recent, lengths)
    if not config.heavy:
        return Eviction(None, heavy, recent)
    tokens = scores.shape[-1]
    found = jnp.take_along_axis(scores, jnp.minimum(kept.positions, tokens - 1), axis=-1)
    found = jnp.where(kept.positions < tokens, found, 0.0)
    return Eviction(jnp.pad(found, [(0, 0), (0, 0), (0, capacity - found.shape[-1])]), heavy, recent)


def most_tokens(config: CacheConfig, heavy: float | int, prompt_tokens: int) -> int:
    """The most tokens that a row holds, just before it is cut back; `prompt_tokens` is the longest prompt."""
    assert config.evict_every is not None
    parts = (
        budget if isinstance(budget, int) else budget_tokens(budget, prompt_tokens) for budget in (heavy, config.recent)
    )
    return config.sinks + sum(parts) + config.evict_every


def evict(layer: LayerCache, weights: Float[Array, "B K C"] | None, active: Int[Array, "B"]) -> LayerCache:
    """Takes one decode step's attention in, and cuts back the rows that are `evict_every` over their budget.

    Args:
      weights: what each slot got, summed over the KV head's queries (`attention.decode_attention_weights`); None where
        nothing is kept by score.
      active: 1 for the rows that took part in the step.
    """
    state, config = layer.eviction, layer.config
    assert state is not None
    assert config.evict_every is not None
    if state.scores is not None:
        update = SCORERS[config.scorer].update
        assert update is not None
        assert weights is not None
        used = (jnp.arange(layer.tail_capacity) < layer.tail_length[:, None]) & (active > 0)[:, None]  # [B, C]
        scores = jnp.where(used[:, None], update(state.scores, weights, config), state.scores)
        state = dataclasses.replace(state, scores=scores)
        layer = dataclasses.replace(layer, eviction=state)
    full = layer.tail_length >= state.budget(config) + config.evict_every
    # A loop of zero or one turns, not a `cond`: XLA updates a loop's carry in place.
    return lax.fori_loop(0, jnp.any(full).astype(jnp.int32), lambda _, layer: _cut_back(layer, full), layer)


def _cut_back(layer: LayerCache, full: Array) -> LayerCache:
    """The full rows with their budget's tokens, moved together in order of position."""
    state, config = layer.eviction, layer.config
    assert state is not None
    capacity = layer.tail_capacity
    slots, length = jnp.arange(capacity), layer.tail_length[:, None]
    forced = (slots < config.sinks) | (slots >= length - state.recent[:, None])  # [B, C]
    scores = jnp.zeros(layer.tail_k.shape[:3], jnp.float32) if state.scores is None else state.scores
    _, order = lax.top_k(rank(scores, forced, slots < length), capacity)  # equal elements come in order of position
    budget = state.budget(config)
    order = jnp.sort(jnp.where(slots < budget[:, None, None], order, capacity), axis=-1)
    order = jnp.where(full[:, None, None], order, slots)
    source = jnp.minimum(order, capacity - 1)
    take = lambda x: jnp.take_along_axis(x, source[..., None], axis=2)  # noqa: E731
    if state.scores is not None:
        scores = jnp.where(order < capacity, jnp.take_along_axis(scores, source, axis=2), 0.0)
        state = dataclasses.replace(state, scores=scores)
    return dataclasses.replace(
        layer,
        tail_k=take(layer.tail_k),
        tail_v=take(layer.tail_v),
        tail_length=jnp.where(full, budget, layer.tail_length),
        eviction=state,
    )
