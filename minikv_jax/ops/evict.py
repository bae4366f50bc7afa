"""Evict: cuts a layer back to its budget after every `evict_every` new tokens.

The budget is that of the prompt: the first `sinks` tokens, the newest `recent` and the `heavy` top-scored of the
others. A share is a share of the prompt. A row grows `evict_every` tokens beyond its budget and is then cut back, so a
layer's capacity does not depend on the number of generated tokens. The scorer's `update` continues the prompt's scores:
with `H2O` and `evict_every=1` this is H2O (arXiv 2306.14048, algorithm 1).

Only full-precision tokens can leave, because the tokens of a packed block share their metadata and layout.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.cache.state import Eviction, LayerCache, Region
from minikv_jax.meshes import call_split, specs
from minikv_jax.methods import calls
from minikv_jax.methods.method import Method
from minikv_jax.ops.select import rank


@jax.named_scope("evict")
def evict(
    layer: LayerCache, state: Eviction, weights: Float[Array, "B K C"] | None, active: Int[Array, "B"]
) -> LayerCache:
    """Updates scores after a decode step and cuts back rows that are `evict_every` tokens over their budget.

    Args:
      layer: the layer's cache.
      state: the layer's `eviction`.
      weights: attention weight of each slot, summed over the KV head's queries (`decode_attention_weights`); None if
        nothing is kept by score.
      active: 1 for rows that took part in the step, else 0.
    """
    return call_split(_evict, (layer, state, weights, active), (1, 1, 1, None), specs(layer, 1))


def _evict(layer: LayerCache, state: Eviction, weights: Array | None, active: Array) -> LayerCache:
    method, tail = layer.method, layer.tail
    assert method.evict_every is not None
    if state.scores is not None and weights is not None:
        used = (jnp.arange(tail.capacity) < tail.length[:, None]) & (active > 0)[:, None]  # [B, C]
        scores = jnp.where(used[:, None], calls.update(method.scorer, state.scores, weights), state.scores)
        state = dataclasses.replace(state, scores=scores)
    full = tail.length >= state.budget(method) + method.evict_every
    # A loop of zero or one iterations instead of `cond`, because XLA updates a loop's carry in place.
    turns = jnp.any(full).astype(jnp.int32)
    tail, state = lax.fori_loop(0, turns, lambda _, carry: _cut_back(carry, full, method), (tail, state))
    return dataclasses.replace(layer, tail=tail, eviction=state)


def _cut_back(carry: tuple[Region[Array], Eviction], full: Array, method: Method) -> tuple[Region[Array], Eviction]:
    """Cuts full rows back to their budget. Kept tokens move together in order of position."""
    tail, state = carry
    capacity = tail.capacity
    slots, length = jnp.arange(capacity), tail.length[:, None]
    forced = (slots < method.sinks) | (slots >= length - state.recent[:, None])  # [B, C]
    scores = jnp.zeros(tail.k.shape[:3], jnp.float32) if state.scores is None else state.scores
    _, order = lax.top_k(rank(scores, forced, slots < length), capacity)  # equal elements come in order of position
    budget = state.budget(method)
    order = jnp.sort(jnp.where(slots < budget[:, None, None], order, capacity), axis=-1)
    order = jnp.where(full[:, None, None], order, slots)
    source = jnp.minimum(order, capacity - 1)
    if state.scores is not None:
        scores = jnp.where(order < capacity, jnp.take_along_axis(scores, source, axis=2), 0.0)
        state = dataclasses.replace(state, scores=scores)
    k, v = (jnp.take_along_axis(x, source[..., None], axis=2) for x in (tail.k, tail.v))
    return Region(k, v, jnp.where(full, budget, tail.length), tail.positions), state
