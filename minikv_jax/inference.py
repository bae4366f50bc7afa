"""A model and a cache together: prefill a prompt, extend by several tokens, decode one token.

Each function takes a cache value and returns a new one, and can stand inside `jax.jit`. The model projects and rotates
(`Llama.forward`); what attention reads and what is kept is decided here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache, LayerCache, LayerCapacity, append, compress, layer_capacity
from minikv_jax.methods.base import BUDGETS, SCORERS, ScorerInputs
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import CHUNK_TOKENS, Llama
from minikv_jax.models.rotary import inverse_frequencies
from minikv_jax.ops import decode_attention as attention
from minikv_jax.ops import evict as eviction
from minikv_jax.ops.select import Kept, budget_tokens, budgets_from_scores, granted, layer_budgets, select_tokens

Store = Callable[[LayerCache], LayerCache]  # where a compressed layer goes; the cache is made of what it returns


def prefill(
    model: Llama,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    config: CacheConfig,
    max_new_tokens: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs right-padded prompts and makes the cache that `config` keeps of them (MiniKV algorithm 1).

    Each layer is compressed as soon as its attention is done, so that one layer's full K and V live at a time; only
    a budget rule that reads scores ("variance") has to see all layers' first. A large batch runs some rows at a time,
    about `CHUNK_TOKENS` tokens, so that its activations take no more than those of one long prompt.

    Returns:
      The final hidden state of each row's last token, and a cache with room for `max_new_tokens`.
    """
    batch, tokens = ids.shape
    chunks = -(-batch // max(CHUNK_TOKENS // tokens, 1))
    rows = -(-batch // chunks)

    def run(ids: Array, lengths: Array, store: Store = lambda layer: layer) -> tuple[Array, KVCache]:
        compressor = Compressor(model.config, config, tokens, max_new_tokens, implementation, store)
        hidden = run_prompt(model, ids, lengths, compressor.add, compressor.needs_column_sums, implementation)
        return last_valid(hidden, lengths), compressor.cache(lengths)

    if chunks == 1:
        return run(ids, lengths)

    def run_rows(i: Array, whole: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        # The last chunk is moved back to end with the batch; the rows that it repeats come out the same.
        start = jnp.minimum(i * rows, batch - rows)
        some_ids, some_lengths = (lax.dynamic_slice_in_dim(x, start, rows) for x in (ids, lengths))

        def put(whole: Any, part: Any) -> Any:
            write = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, axis=0)  # noqa: E731
            return jax.tree.map(write, whole, part)

        # A layer's rows enter the whole cache before the next layer runs: the chunk's cache never lives as one.
        hidden, cache = run(some_ids, some_lengths, lambda layer: put(whole[1].layers[layer.number], layer))
        return put(whole[0], hidden), KVCache(cache.layers, lengths)

    part = jax.eval_shape(run, ids[:rows], lengths[:rows])
    whole = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), part)
    return lax.fori_loop(0, chunks, run_rows, whole)


def one_shot(model: Llama, ids: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B T V"]:
    """Runs the whole model without a cache: float32 logits of right-padded rows of `lengths` tokens (None: all `T`).

    Logits in the padding are garbage. Raises ValueError if `T` exceeds the model's positions.
    """
    batch, tokens = ids.shape
    known = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), ids.shape)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        return attention.prefill_attention(q, k, v, known, window=model.window(layer), with_scores=False)[0]

    return model.logits(model.forward(ids, positions, attend))


def last_valid(hidden: Float[Array, "B T *D"], lengths: Int[Array, "B"]) -> Float[Array, "B *D"]:
    """The hidden state of each row's last valid token."""
    return hidden[jnp.arange(hidden.shape[0]), lengths - 1]


def prefill_layer(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    config: CacheConfig,
    max_new_tokens: int,
    *,
    layer: int = 0,
    num_layers: int = 1,
    window: int | None = None,
    frequencies: Float[Array, "F"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """One layer's causal attention over right-padded prompts, and the cache that `config` keeps of it.

    For a model of one's own. New tokens then go through `append` and `decode_attention` (`examples/flax_linen.py`).

    Args:
      q, k, v: after the model's own position embedding.
      layer, num_layers: which layer this is of how many: budgets may depend on it.
      window: the layer's sliding window.
      frequencies: RoPE's radians per position, float32 `[H/2]`, which some scorers need.

    Returns:
      The attention output, zero in the padding, and a cache with room for `max_new_tokens`.

    Raises:
      ValueError: shapes that disagree, or a budget rule that has to see the scores of all layers.
      NotImplementedError: a method that evicts during generation, which `decode` does.
    """
    if config.evict_every is not None:
        raise NotImplementedError(
            f"evict_every={config.evict_every}: only this library's own models evict during generation"
        )
    if BUDGETS[config.budget].needs_scores:
        raise ValueError(f"budget={config.budget!r} reads the scores of all layers: a layer alone cannot be prefilled")
    scorer = SCORERS[config.scorer]
    out, sums = attention.prefill_attention(
        q, k, v, lengths, window=window, with_scores=scorer.needs_column_sums, implementation=implementation
    )
    scores = layer_scores(ScorerInputs(q, k, v, lengths, sums, window, jnp.int32(layer), frequencies), config)
    share = layer_budgets(config, num_layers)[layer]
    capacity = layer_capacity(config, share, q.shape[1], max_new_tokens, window)
    kept = choose(scores, lengths, budget_tokens(share, lengths), config, capacity, window)
    return out, compress(k, v, kept, config, capacity, window, implementation, layer)


def run_prompt(
    model: Llama,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    visit: Callable[[ScorerInputs], Any],
    column_sums: bool,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states of right-padded prompts in full attention; `visit` sees each layer's inputs, in order.

    What `visit` returns is made before the next layer begins: nothing it was made from has to live on.
    """

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = model.window(layer)
        out, sums = attention.prefill_attention(
            q, k, v, lengths, window=window, with_scores=column_sums, implementation=implementation
        )
        made = visit(scorer_inputs(model.config, layer, q, k, v, lengths, sums))
        return lax.optimization_barrier((out, made))[0]

    return model.forward(ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), attend)


def scorer_inputs(
    model: ModelConfig, layer: int, q: Array, k: Array, v: Array, lengths: Array, column_sums: Array | None
) -> ScorerInputs:
    """One layer's arrays with what the model's config says of the layer."""
    frequencies = jnp.asarray(inverse_frequencies(model))
    return ScorerInputs(q, k, v, lengths, column_sums, model.window(layer), jnp.int32(layer), frequencies)


class Compressor:
    """Makes the cache that `config` keeps of a prompt, from one layer's keys and values after the other.

    Prefill attention does not depend on the method, so several compressors may see the same layers.

    Attributes:
      kept: which tokens each layer's cache holds.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: CacheConfig,
        tokens: int,
        max_new_tokens: int,
        implementation: str | None = None,
        store: Store = lambda layer: layer,
    ):
        self.config = config
        self._implementation = implementation
        self._store = store
        self._heavy = layer_budgets(config, model.num_hidden_layers)
        self._capacities = memory.capacities(model, config, tokens, max_new_tokens)
        self.kept: list[Kept] = []
        self._pending: list[tuple[ScorerInputs, Array]] = []
        self._layers: list[LayerCache] = []

    @property
    def needs_column_sums(self) -> bool:
        """Whether `add` reads `ScorerInputs.column_sums`."""
        return SCORERS[self.config.scorer].needs_column_sums

    def add(self, inputs: ScorerInputs) -> LayerCache | None:
        """Takes the next layer; returns its cache, unless the budget waits for other layers."""
        scores = layer_scores(inputs, self.config)
        if BUDGETS[self.config.budget].needs_scores:
            self._pending.append((inputs, scores))
            return None
        return self._compress(inputs, scores, granted(self._heavy[len(self._layers)], inputs.lengths))

    def cache(self, lengths: Int[Array, "B"]) -> KVCache:
        """The cache, once every layer has been added."""
        if self._pending:
            counts = budgets_from_scores([scores for _, scores in self._pending], lengths, self.config)
            for (inputs, scores), count in zip(self._pending, counts, strict=True):
                self._compress(inputs, scores, count)
        return KVCache(tuple(self._layers), lengths)

    def _compress(self, inputs: ScorerInputs, scores: Array, heavy: Array) -> LayerCache:
        number = len(self._layers)
        layer, kept = compress_layer(
            inputs, scores, heavy, self.config, self._capacities[number], number, self._implementation
        )
        self.kept.append(kept)
        self._layers.append(self._store(layer))
        return self._layers[-1]


def compress_layer(
    inputs: ScorerInputs,
    scores: Float[Array, "B K T"],
    heavy: Int[Array, "B"],
    config: CacheConfig,
    capacity: LayerCapacity,
    number: int,
    implementation: str | None = None,
) -> tuple[LayerCache, Kept]:
    """The cache of layer `number` under a budget of `heavy` top-scored tokens, and which tokens it holds."""
    kept = choose(scores, inputs.lengths, heavy, config, capacity, inputs.window)
    layer = compress(inputs.k, inputs.v, kept, config, capacity, inputs.window, implementation, number)
    if config.evict_every is not None:
        state = eviction.begin(scores, kept, inputs.lengths, heavy, config, capacity.tail)
        layer = dataclasses.replace(layer, eviction=state)
    return layer, kept


def layer_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Every token's score; zero where nothing is evicted."""
    batch, tokens, kv_heads, _ = inputs.k.shape
    if config.keeps_all and inputs.window is None:
        return jnp.zeros((batch, kv_heads, tokens), jnp.float32)
    return SCORERS[config.scorer].score(inputs, config).astype(jnp.float32)


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
    tails are packed. Without quantisation this equals running the whole sequence at once. A method that evicts during
    generation takes them one by one instead, each a decode step.

    Returns:
      The final hidden states (garbage in the padding) and the new cache.
    """
    if cache.layers[0].eviction is not None:
        return _extend_by_steps(model, cache, ids, lengths, implementation)
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


def decode(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """One decode step: appends each active row's token (`active[b]` is 1 or 0), attends over the cache, then evicts."""
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
    weights = None
    if new.eviction is not None and new.eviction.scores is not None:
        out, weights = attention.decode_attention_weights(q[:, 0], new, implementation=implementation)
    else:
        out = attention.decode_attention(q[:, 0], new, positions[:, 0], implementation=implementation)
    return out[:, None], new if new.eviction is None else eviction.evict(new, weights, active)
