"""Capacities of a layer's cache in tokens, computed from the method and the longest prompt."""

from __future__ import annotations

from typing import NamedTuple

from minikv_jax.cache.budgets import layer_budgets
from minikv_jax.methods.method import Amount, Method
from minikv_jax.models import windows
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.windows import Window


class LayerCapacity(NamedTuple):
    """Static sizes of a layer's cache, in tokens.

    Attributes:
      kept: most prompt tokens that a row keeps, sinks included.
      packed, tail: capacities of the two regions.
      retrieval: sizes of the cache of the layer's retrieval heads, which keep all tokens; None if it has none.
    """

    kept: int
    packed: int
    tail: int
    retrieval: LayerCapacity | None = None


def layer_capacity(
    method: Method, heavy: Amount, prompt_tokens: int, max_new_tokens: int, window: Window | None = None
) -> LayerCapacity:
    """Computes the capacities of a layer with budget `heavy` for prompts of at most `prompt_tokens`."""
    kept = kept_capacity(method, heavy, prompt_tokens, window)
    if method.quantizer is None:
        tail = max(kept, method.sinks) + max_new_tokens
        if method.evict_every is not None:
            tail = min(tail, largest_row(method, heavy, prompt_tokens))
        return LayerCapacity(kept, 0, tail)
    block = method.quantizer.block
    full_precision = method.sinks + method.tail_keep
    packed = max(kept + max_new_tokens - full_precision, block) // block * block
    return LayerCapacity(kept, packed, full_precision + method.flush_block)


def kept_capacity(method: Method, heavy: Amount, tokens: int, window: Window | None = None) -> int:
    """Most tokens that a row of at most `tokens` keeps with budget `heavy`, sinks included."""
    kept = method.sinks + method.recent.tokens(tokens) + heavy.tokens(tokens)
    return min(kept, tokens if window is None else min(tokens, windows.size(window) - 1))


def largest_row(method: Method, heavy: Amount, prompt_tokens: int) -> int:
    """Most tokens that a row holds just before it is cut back. `prompt_tokens` is the longest prompt."""
    assert method.evict_every is not None
    budgets = heavy.granted(prompt_tokens) + method.recent.granted(prompt_tokens)
    return method.sinks + budgets + method.evict_every


def capacities(
    model: ModelConfig, method: Method, prompt_length: int, max_new_tokens: int
) -> tuple[LayerCapacity, ...]:
    """Computes each layer's capacities for prompts of at most `prompt_length` tokens."""
    layers = []
    for layer, heavy in enumerate(layer_budgets(method, model.num_hidden_layers)):
        sizes = prompt_length, max_new_tokens, model.window(layer)
        capacity = layer_capacity(method, heavy, *sizes)
        if any(layer == of for of, _ in method.retrieval_heads):
            whole = method.of_retrieval_heads
            capacity = capacity._replace(retrieval=layer_capacity(whole, whole.heavy, *sizes))
        layers.append(capacity)
    return tuple(layers)
