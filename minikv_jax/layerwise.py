"""A model and a cache run layer by layer, each layer a compiled program of its own.

`generate` is one program for all layers: the fastest to run, and the longest to compile. An evaluation runs many
methods, each for a short while. Here layers of equal shapes share a program, so that what is compiled does not grow
with their number. What lies between them (embedding, final norm, logits) runs op by op.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import inference
from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache, LayerCache, LayerCapacity
from minikv_jax.methods.base import BUDGETS, QUANTIZERS, ScorerInputs
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Layer, Llama
from minikv_jax.models.rotary import inverse_frequencies, rotary_tables
from minikv_jax.ops import decode_attention as attention
from minikv_jax.ops import evict as eviction
from minikv_jax.ops.select import Kept, budgets_from_scores, layer_budgets


class PromptLayer(NamedTuple):
    """What one layer's attention saw of a prompt: enough for any method to compress it."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    column_sums: Float[Array, "B K T"] | None


class Compressed(NamedTuple):
    """What a method made of a prompt.

    Attributes:
      kept: the tokens held, per layer.
      scored: whether every score of a row is a number; a NaN counts as the lowest.
    """

    cache: KVCache
    kept: list[Kept]
    scored: Bool[Array, "B"]


def prefill_layers(
    model: Llama,
    ids: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, "B"],
    column_sums: bool,
    implementation: str | None,
) -> tuple[Float[Array, "B D"], list[PromptLayer]]:
    """The hidden state of each row's last token, and what every layer saw."""
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    x, found = model.embed(ids), []
    for number, layer in enumerate(model.layers):
        case = {"window": model.window(number), "column_sums": column_sums, "implementation": implementation}
        x, seen = _prefill_layer(layer, x, lengths, model=model.config, **case)
        found.append(seen)
    return model.norm(inference.last_valid(x, lengths)), found


@functools.partial(jax.jit, static_argnames=("model", "window", "column_sums", "implementation"))
def _prefill_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    *,
    model: ModelConfig,
    window: int | None,
    column_sums: bool,
    implementation: str | None,
) -> tuple[Float[Array, "B T D"], PromptLayer]:
    found: list[PromptLayer] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        out, sums = attention.prefill_attention(
            q, k, v, lengths, window=window, with_scores=column_sums, implementation=implementation
        )
        found.append(PromptLayer(q, k, v, sums))
        return out

    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return layer(x, *rotary_tables(model, positions), attend), found[0]


def shared_capacities(
    model: ModelConfig, config: CacheConfig, prompt_length: int, max_new_tokens: int
) -> tuple[LayerCapacity, ...]:
    """`memory.capacities`, but layers whose budgets alone differ all get the largest, and so can share a program.

    What a cache holds does not change, only the room that it leaves unused.
    """
    own = memory.capacities(model, config, prompt_length, max_new_tokens)
    windows = [model.window(number) for number in range(len(own))]
    largest = {
        window: LayerCapacity(*map(max, zip(*(own[i] for i, w in enumerate(windows) if w == window), strict=True)))
        for window in set(windows)
    }
    return tuple(largest[window] for window in windows)


def compress_layers(
    model: ModelConfig,
    config: CacheConfig,
    layers: list[PromptLayer],
    lengths: Int[Array | np.ndarray, "B"],
    capacities: Sequence[LayerCapacity],
    implementation: str | None,
) -> Compressed:
    """The cache that a method keeps of `prefill_layers`' prompt.

    `capacities` are the layers', of `memory.capacities` or larger ones (`shared_capacities`).
    """
    lengths = jnp.asarray(lengths)
    windows = [model.window(number) for number in range(len(layers))]
    by_layer = QUANTIZERS[config.quantizer].by_layer
    scored = [
        _score_layer(layer, np.int32(number), lengths, model=model, config=config, window=windows[number])
        for number, layer in enumerate(layers)
    ]
    scores, numbers = zip(*scored, strict=True)
    if BUDGETS[config.budget].needs_scores:
        heavy = list(budgets_from_scores(scores, lengths, config))
    else:
        heavy = [eviction.granted(share, lengths) for share in layer_budgets(config, len(layers))]
    found = [
        _compress_layer(
            layer,
            scores[number],
            heavy[number],
            lengths,
            config=config,
            capacity=capacity,
            number=number if by_layer else 0,
            window=windows[number],
            implementation=implementation,
        )
        for number, (layer, capacity) in enumerate(zip(layers, capacities, strict=True))
    ]
    cache = KVCache(tuple(cache for cache, _ in found), lengths)
    return Compressed(cache, [kept for _, kept in found], functools.reduce(jnp.logical_and, numbers))


@functools.partial(jax.jit, static_argnames=("model", "config", "window"))
def _score_layer(
    layer: PromptLayer,
    number: Int[Array, ""],
    lengths: Int[Array, "B"],
    *,
    model: ModelConfig,
    config: CacheConfig,
    window: int | None,
) -> tuple[Float[Array, "B K T"], Bool[Array, "B"]]:
    """The scores, and whether those of a row's tokens are all numbers."""
    inputs = ScorerInputs(
        *layer[:3], lengths, layer.column_sums, window, number, jnp.asarray(inverse_frequencies(model))
    )
    scores = inference.layer_scores(inputs, config)
    padding = jnp.arange(scores.shape[-1]) >= lengths[:, None, None]
    return scores, jnp.all(~jnp.isnan(scores) | padding, axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("config", "capacity", "number", "window", "implementation"))
def _compress_layer(
    layer: PromptLayer,
    scores: Float[Array, "B K T"],
    heavy: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    config: CacheConfig,
    capacity: LayerCapacity,
    number: int,
    window: int | None,
    implementation: str | None,
) -> tuple[LayerCache, Kept]:
    inputs = ScorerInputs(*layer[:3], lengths, layer.column_sums, window)
    return inference.compress_layer(inputs, scores, heavy, config, capacity, number, implementation)


def decode_step(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """`inference.decode` layer by layer. The cache is donated."""
    positions = cache.length[:, None]
    x, layers = model.embed(token[:, None]), []
    for layer, old in zip(model.layers, cache.layers, strict=True):
        x, new = _decode_layer(layer, old, x, positions, active, model=model.config, implementation=implementation)
        layers.append(new)
    return model.norm(x)[:, 0], KVCache(tuple(layers), cache.length + active)


@functools.partial(jax.jit, static_argnames=("model", "implementation"), donate_argnames="cache")
def _decode_layer(
    layer: Layer,
    cache: LayerCache,
    x: Float[Array, "B 1 D"],
    positions: Int[Array, "B 1"],
    active: Int[Array, "B"],
    *,
    model: ModelConfig,
    implementation: str | None,
) -> tuple[Float[Array, "B 1 D"], LayerCache]:
    found: list[LayerCache] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        out, new = inference.decode_layer(cache, q, k, v, active, positions, implementation)
        found.append(new)
        return out

    return layer(x, *rotary_tables(model, positions), attend), found[0]
