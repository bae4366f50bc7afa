"""Decode: one token, or several, go through a model and its cache: append, attend, evict.

Each function takes a cache value and returns a new one, and can stand inside `jax.jit`. The model projects and rotates
(`Llama.forward`); what attention reads and what is kept is decided here.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.cache.state import KVCache, LayerCache
from minikv_jax.models.decoder import Llama
from minikv_jax.ops.append import append
from minikv_jax.ops.decode_attention import decode_attention, decode_attention_weights
from minikv_jax.ops.evict import evict
from minikv_jax.ops.extend_attention import extend_attention


def decode(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """One decode step: appends each active row's token (`active[b]` is 1 or 0), attends over the cache, then evicts.

    Returns:
      The final hidden states and the new cache.
    """
    positions = cache.length[:, None]
    layers: list[LayerCache] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        out, new = decode_layer(cache.layers[layer], q, k, v, active, positions, implementation)
        layers.append(new)
        return out

    hidden = model.forward(token[:, None], positions, attend)
    return hidden[:, 0], KVCache(tuple(layers), cache.length + active)


def decode_layer(
    layer: LayerCache,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    active: Int[Array, "B"],
    positions: Int[Array, "B 1"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """One layer's part in a decode step: its attention output, and its cache with the new token."""
    new = append(layer, k, v, active, positions, implementation)
    state = new.eviction
    if state is not None and state.scores is not None:
        out, weights = decode_attention_weights(q[:, 0], new, implementation=implementation)
    else:
        out, weights = decode_attention(q[:, 0], new, positions[:, 0], implementation=implementation), None
    return out[:, None], new if state is None else evict(new, state, weights, active)


def extend(
    model: Llama,
    cache: KVCache,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends each row's first `lengths[b]` of `T` tokens: a further turn of a chat, or a teacher-forced continuation.

    The new tokens see the cache as it is stored and one another in full precision; then they enter the tail, and full
    tails are packed. Without quantisation this equals running the whole sequence at once. A method that evicts during
    generation takes them one by one instead, each a decode step.

    Returns:
      The final hidden states (garbage in the padding) and the new cache.
    """
    if cache.layers[0].eviction is not None:
        return _extend_by_steps(model, cache, ids, lengths, implementation)
    positions = cache.length[:, None] + jnp.arange(ids.shape[1])
    layers: list[LayerCache] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        old = cache.layers[layer]
        out = extend_attention(q, k, v, old, lengths, positions, implementation=implementation)
        layers.append(append(old, k, v, lengths, positions, implementation))
        return out

    hidden = model.forward(ids, positions, attend)
    return hidden, KVCache(tuple(layers), cache.length + lengths)


def _extend_by_steps(
    model: Llama, cache: KVCache, ids: Array, lengths: Array, implementation: str | None
) -> tuple[Float[Array, "B T D"], KVCache]:
    def step(cache: KVCache, column: tuple[Array, Array]) -> tuple[KVCache, Array]:
        token, number = column
        active = (number < lengths).astype(jnp.int32)
        hidden, cache = decode(model, cache, token, active, implementation)
        return cache, hidden

    cache, hidden = lax.scan(step, cache, (ids.T, jnp.arange(ids.shape[1])))
    return hidden.swapaxes(0, 1), cache
