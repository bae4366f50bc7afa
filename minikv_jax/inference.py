"""A model and a cache together: prefill a prompt, extend by several tokens, decode one token.

Each function takes a cache value and returns a new one, and can stand inside `jax.jit`. The model projects and rotates
(`Llama.forward`); what attention reads and what is kept is decided here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import attention, memory
from minikv_jax.cache import KVCache, LayerCache, LayerCapacity, append, compress
from minikv_jax.config import CacheConfig
from minikv_jax.model import Llama
from minikv_jax.selection import (
    SCORERS,
    Kept,
    ScorerInputs,
    budget_tokens,
    layer_budgets,
    select_tokens,
    variance_budgets,
)


def prefill(
    model: Llama,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    config: CacheConfig,
    max_new_tokens: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs right-padded prompts and makes the cache that `config` keeps of them (MiniKV algorithm 1).

    Each layer is compressed as soon as its attention is done, so that one layer's full K and V live at a time; only
    `budget="variance"` has to see all layers' scores first.

    Returns:
      The final hidden states (garbage in the padding) and a cache with room for `max_new_tokens`.
    """
    batch, tokens = ids.shape
    heavy = layer_budgets(config, model.config.num_hidden_layers)
    capacities = memory.capacities(model.config, config, tokens, max_new_tokens)
    pending: list[tuple[Array, Array, Array]] = []
    layers: list[LayerCache] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = model.window(layer)
        scorer = SCORERS[config.scorer]
        out, sums = attention.prefill_attention(
            q, k, v, lengths, window=window, with_scores=scorer.needs_column_sums, implementation=implementation
        )
        if config.keeps_all and window is None:
            scores = jnp.zeros((batch, k.shape[2], tokens), jnp.float32)
        else:
            scores = scorer.score(ScorerInputs(q, k, v, lengths, sums, window), config)
        if config.budget == "variance":
            pending.append((k, v, scores))
        else:
            count = budget_tokens(heavy[layer], lengths)
            kept = choose(scores, lengths, count, config, capacities[layer], window)
            layers.append(compress(k, v, kept, config, capacities[layer], window, implementation))
        return out

    positions = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    hidden = model.forward(ids, positions, attend)
    if pending:
        counts = variance_budgets([scores for _, _, scores in pending], lengths, config)
        for layer, (k, v, scores) in enumerate(pending):
            window = model.window(layer)
            kept = choose(scores, lengths, counts[layer], config, capacities[layer], window)
            layers.append(compress(k, v, kept, config, capacities[layer], window, implementation))
    return hidden, KVCache(tuple(layers), lengths)


def choose(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    config: CacheConfig,
    capacity: LayerCapacity,
    window: int | None = None,
) -> Kept:
    """The tokens a layer keeps; without eviction that is all of them, and nothing is sorted."""
    if config.keeps_all and window is None:
        batch, kv_heads, tokens = scores.shape
        positions = jnp.arange(tokens)
        kept = jnp.where(positions < lengths[:, None, None], positions, tokens)
        return Kept(jnp.broadcast_to(kept, (batch, kv_heads, tokens)), lengths)
    return select_tokens(scores, lengths, heavy, config, capacity.kept, window)


def extend(
    model: Llama,
    cache: KVCache,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends each row's first `lengths[b]` of `T` tokens: a further turn of a chat, or a teacher-forced continuation.

    The new tokens see the cache as it is stored and one another in full precision; then they enter the tail, and full
    tails are packed. Without quantisation this equals running the whole sequence at once.

    Returns:
      The final hidden states (garbage in the padding) and the new cache.
    """
    offsets = jnp.arange(ids.shape[1])
    positions = cache.length[:, None] + offsets
    layers: list[LayerCache] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        old = cache.layers[layer]
        out = attention.extend_attention(q, k, v, old, lengths, positions, implementation=implementation)
        layers.append(append(old, k, v, lengths, positions, implementation))
        return out

    hidden = model.forward(ids, positions, attend)
    return hidden, KVCache(tuple(layers), cache.length + lengths)


def decode(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """One decode step: appends each active row's token (`active[b]` is 1 or 0), then attends over the cache."""
    positions = cache.length[:, None]
    layers: list[LayerCache] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        new = append(cache.layers[layer], k, v, active, positions, implementation)
        layers.append(new)
        out = attention.decode_attention(q[:, 0], new, positions[:, 0], implementation=implementation)
        return out[:, None]

    hidden = model.forward(token[:, None], positions, attend)
    return hidden[:, 0], KVCache(tuple(layers), cache.length + active)
