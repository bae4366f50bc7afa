"""Prefill and decode layer by layer, with one compiled program per layer.

`generate` compiles one program for all layers, which runs fastest but takes longest to compile. An evaluation runs many
methods for a few tokens each. Here layers of equal shapes share a program, so compile time does not grow with depth.
Embedding, final norm and logits run op by op.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.cache.capacity import LayerCapacity, capacities
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import HeadGroups, LayerCache
from minikv_jax.decode import decode_layer, extend_layer
from minikv_jax.keep import keep
from minikv_jax.lookahead import join, likeliest
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig, Rope
from minikv_jax.models.decoder import Layer, Llama
from minikv_jax.models.rotary import inverse_frequencies, rotary_tables, row_positions, tuned
from minikv_jax.models.windows import Window
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.select import Kept
from minikv_jax.prefill import heavy_tokens, last_valid, score
from minikv_jax.prompts import check_second_run


class PromptLayer(NamedTuple):
    """One layer's queries, keys and values of a prompt after RoPE. Any method can compress them."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    column_sums: Float[Array, "B K T"] | None
    sink_logits: Float[Array, "N"] | None
    output_projection: Float[Array, "NV D"] | None = None


class Compressed(NamedTuple):
    """A prompt compressed by a method.

    Attributes:
      cache: the compressed cache.
      kept: the kept tokens of each layer's parts.
      scored: per row, whether all scores are numbers. NaN counts as the lowest score.
    """

    cache: KVCache
    kept: list[tuple[Kept, ...]]
    scored: Bool[Array, "B"]


def prefill_layers(
    model: Llama,
    ids: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, "B"],
    column_sums: bool,
    implementation: str | None,
) -> tuple[Float[Array, "B D"], list[PromptLayer]]:
    """Runs a prompt. Returns the hidden state of each row's last token, and every layer's `PromptLayer`."""
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    x, layers = model.embed(ids), []
    for number, layer in enumerate(model.layers):
        case = {"window": model.window(number), "rope": model.config.rope(number), "column_sums": column_sums}
        x, seen = _prefill_layer(layer, x, lengths, model=model.config, **case, implementation=implementation)
        layers.append(seen._replace(output_projection=layer.output_projection))  # the model's own array, not a copy
    return model.norm(last_valid(x, lengths)), layers


@functools.partial(jax.jit, static_argnames=("model", "window", "rope", "column_sums", "implementation"))
def _prefill_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    *,
    model: ModelConfig,
    window: Window | None,
    rope: Rope,
    column_sums: bool,
    implementation: str | None,
) -> tuple[Float[Array, "B T D"], PromptLayer]:
    seen: list[PromptLayer] = []
    positions = row_positions(x.shape[1], lengths, by_length=rope.by_length)

    def attend(q: Array, k: Array, v: Array) -> Array:
        q = tuned(q, rope, positions)
        out, sums = prefill_attention(
            q,
            k,
            v,
            lengths,
            window=window,
            soft_cap=model.attn_logit_softcapping,
            sink_logits=layer.sink_logits,
            with_scores=column_sums,
            implementation=implementation,
        )
        seen.append(PromptLayer(q, k, v, sums, layer.sink_logits))
        return out

    return layer(x, *rotary_tables(rope, positions), attend), seen[0]


def shared_capacities(
    model: ModelConfig, method: Method, prompt_length: int, max_new_tokens: int
) -> tuple[LayerCapacity, ...]:
    """Capacities for shared programs: layers that differ only in their budgets all get the largest capacity.

    The cache holds the same tokens; only unused room grows.
    """
    own = capacities(model, method, prompt_length, max_new_tokens)
    windows = [model.window(number) for number in range(len(own))]
    alike = {w: [c[:3] for c, of in zip(own, windows, strict=True) if of == w] for w in set(windows)}
    largest = {window: tuple(map(max, zip(*sizes, strict=True))) for window, sizes in alike.items()}
    return tuple(LayerCapacity(*largest[w])._replace(retrieval=c.retrieval) for c, w in zip(own, windows, strict=True))


def compress_layers(
    model: ModelConfig,
    method: Method,
    layers: list[PromptLayer],
    lengths: Int[Array | np.ndarray, "B"],
    seen: Int[Array | np.ndarray, "B"],
    layer_capacities: Sequence[LayerCapacity],
    implementation: str | None,
) -> Compressed:
    """Compresses a prompt that `prefill_layers` has run.

    Args:
      model: the model's config.
      method: decides what to keep and how to store it.
      layers: returned by `prefill_layers`.
      lengths: tokens of each prompt.
      seen: tokens of each row in its last run (`look_ahead`).
      layer_capacities: returned by `capacities` or, for shared programs, `shared_capacities`.
      implementation: implementation of the ops; None for the fastest recorded one.
    """
    lengths = jnp.asarray(lengths)
    seen = jnp.asarray(seen)
    specs = [LayerSpec(method, model.window(number), number) for number in range(len(layers))]
    case: dict[str, Any] = {"model": model, "implementation": implementation}
    cases = [case | {"rope": model.rope(number), "spec": spec} for number, spec in enumerate(specs)]
    scored = [_score_layer(layer, np.int32(number), seen, **cases[number]) for number, layer in enumerate(layers)]
    scores, are_numbers = zip(*scored, strict=True)
    heavy = heavy_tokens(method, len(layers), lengths, scores)
    made = [
        _keep_layer(*arrays, lengths, seen, capacity=capacity, **case)
        for *arrays, capacity, case in zip(layers, scores, heavy, layer_capacities, cases, strict=True)
    ]
    cache = KVCache(tuple(layer for layer, _ in made), lengths)
    return Compressed(cache, [kept for _, kept in made], functools.reduce(jnp.logical_and, are_numbers))


@functools.partial(jax.jit, static_argnames=("model", "rope", "spec", "implementation"))
def _score_layer(
    layer: PromptLayer,
    number: Int[Array, ""],
    lengths: Int[Array, "B"],
    *,
    model: ModelConfig,
    rope: Rope,
    spec: LayerSpec,
    implementation: str | None,
) -> tuple[Float[Array, "B K T"], Bool[Array, "B"]]:
    """Scores a layer's tokens. Also returns, per row, whether all scores are numbers."""
    scores = score(_inputs(layer, number, lengths, model, rope, spec), spec.method, implementation)
    padding = jnp.arange(scores.shape[-1]) >= lengths[:, None, None]
    return scores, jnp.all(~jnp.isnan(scores) | padding, axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("model", "rope", "capacity", "spec", "implementation"))
def _keep_layer(
    layer: PromptLayer,
    scores: Float[Array, "B K T"],
    heavy: Int[Array, "B"],
    lengths: Int[Array, "B"],
    seen: Int[Array, "B"],
    *,
    model: ModelConfig,
    rope: Rope,
    capacity: LayerCapacity,
    spec: LayerSpec,
    implementation: str | None,
) -> tuple[LayerCache | HeadGroups, tuple[Kept, ...]]:
    inputs = _inputs(layer, 0, seen, model, rope, spec)
    return keep(inputs, scores, lengths, heavy, capacity, spec, implementation)


def _inputs(
    layer: PromptLayer, number: Array | int, lengths: Array, model: ModelConfig, rope: Rope, spec: LayerSpec
) -> LayerInputs:
    frequencies = jnp.asarray(inverse_frequencies(rope, lengths))
    more: dict[str, Any] = {"soft_cap": model.attn_logit_softcapping, "sink_logits": layer.sink_logits}
    more |= {"output_projection": layer.output_projection}
    return LayerInputs(*layer[:3], lengths, layer.column_sums, spec.window, number, frequencies, **more)


def look_ahead(
    model: Llama,
    method: Method,
    prompt: tuple[Int[Array | np.ndarray, "B T"], Int[Array | np.ndarray, "B"]],
    hidden: Float[Array, "B D"],
    layers: list[PromptLayer],
    implementation: str | None,
) -> tuple[list[PromptLayer], Int[Array, "B"]]:
    """Runs prompts once more with a draft or themselves after them, if the method does (`prefill.prefill`).

    `hidden` and `layers` are what `prefill_layers` returned for the prompt's padded ids and lengths.

    Returns:
      The layers to compress, and the tokens of each row in its last run.

    Raises:
      ValueError: too few positions for the second run.
    """
    ids, lengths = map(jnp.asarray, prompt)
    if not method.runs_twice:
        return layers, lengths
    check_second_run(model, int(lengths.max()), method)
    tokens, counts = ids, lengths
    if method.lookahead:
        plain = dataclasses.replace(method, lookahead=0)
        sizes = shared_capacities(model.config, plain, ids.shape[1], method.lookahead)
        cache = compress_layers(model.config, plain, layers, lengths, lengths, sizes, implementation).cache
        active, drafted = jnp.ones_like(lengths), []
        for _ in range(method.lookahead):
            token, going = likeliest(model, hidden, active)
            drafted.append((token, active))
            hidden, cache = decode_step(model, cache, token, active, implementation)
            active = going
        tokens, flags = (jnp.stack(column, axis=1) for column in zip(*drafted, strict=True))
        counts = flags.sum(axis=1)
    both = join(ids, lengths, tokens, counts, model.config.max_position_embeddings)
    _, layers = prefill_layers(model, both.ids, both.seen, method.scorer.needs_column_sums, implementation)
    return layers, both.seen


def decode_step(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Decodes one token per row layer by layer, with the results of `decode.decode`. The cache is donated."""
    positions = cache.length[:, None]
    x, layers = model.embed(token[:, None]), []
    for number, (layer, old) in enumerate(zip(model.layers, cache.layers, strict=True)):
        case = {"rope": model.config.rope(number), "soft_cap": model.config.attn_logit_softcapping}
        x, new = _decode_layer(layer, old, x, positions, active, **case, implementation=implementation)
        layers.append(new)
    return model.norm(x)[:, 0], KVCache(tuple(layers), cache.length + active)


@functools.partial(jax.jit, static_argnames=("rope", "soft_cap", "implementation"), donate_argnames="cache")
def _decode_layer(
    layer: Layer,
    cache: LayerCache | HeadGroups,
    x: Float[Array, "B 1 D"],
    positions: Int[Array, "B 1"],
    active: Int[Array, "B"],
    *,
    rope: Rope,
    soft_cap: float | None,
    implementation: str | None,
) -> tuple[Float[Array, "B 1 D"], LayerCache | HeadGroups]:
    updated: list[LayerCache | HeadGroups] = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        how: dict[str, Any] = {"implementation": implementation, "soft_cap": soft_cap}
        out, new = decode_layer(
            cache, tuned(q, rope, positions), k, v, active, positions, sink_logits=layer.sink_logits, **how
        )
        updated.append(new)
        return out

    return layer(x, *rotary_tables(rope, positions), attend), updated[0]


def extend_layers(
    model: Llama,
    cache: KVCache,
    ids: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, "B"],
    implementation: str | None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs several new tokens per row layer by layer, as `decode.extend` does. The cache is donated.

    Returns:
      The hidden state of each row's last new token, and the new cache.
    """
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    if cache.layers[0].eviction is not None:
        return _extend_by_steps(model, cache, ids, lengths, implementation)
    x, layers = model.embed(ids), []
    for number, (layer, old) in enumerate(zip(model.layers, cache.layers, strict=True)):
        case = {"rope": model.config.rope(number), "soft_cap": model.config.attn_logit_softcapping}
        x, new = _extend_layer(layer, old, x, cache.length, lengths, **case, implementation=implementation)
        layers.append(new)
    return model.norm(last_valid(x, lengths)), KVCache(tuple(layers), cache.length + lengths)


@functools.partial(jax.jit, static_argnames=("rope", "soft_cap", "implementation"), donate_argnames="cache")
def _extend_layer(
    layer: Layer,
    cache: LayerCache | HeadGroups,
    x: Float[Array, "B T D"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    rope: Rope,
    soft_cap: float | None,
    implementation: str | None,
) -> tuple[Float[Array, "B T D"], LayerCache | HeadGroups]:
    updated: list[LayerCache | HeadGroups] = []
    positions = row_positions(x.shape[1], lengths, start, by_length=rope.by_length)

    def attend(q: Array, k: Array, v: Array) -> Array:
        how: dict[str, Any] = {"implementation": implementation, "soft_cap": soft_cap}
        q = tuned(q, rope, positions)
        out, new = extend_layer(cache, q, k, v, lengths, positions, sink_logits=layer.sink_logits, **how)
        updated.append(new)
        return out

    return layer(x, *rotary_tables(rope, positions), attend), updated[0]


def _extend_by_steps(
    model: Llama, cache: KVCache, ids: Array, lengths: Array, implementation: str | None
) -> tuple[Float[Array, "B D"], KVCache]:
    """Decodes the new tokens one by one, for a method that evicts during generation."""
    last = jnp.zeros((ids.shape[0], model.config.hidden_size), model.dtype)
    for step in range(int(lengths.max())):
        active = step < lengths
        hidden, cache = decode_step(model, cache, ids[:, step], active.astype(jnp.int32), implementation)
        last = jnp.where(active[:, None], hidden, last)
    return last, cache
