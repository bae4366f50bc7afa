"""Text generation: one jit-compiled program per shape runs prefill, compression and the whole decode loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from minikv_jax import attention, inference, memory, presets
from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig
from minikv_jax.model import Llama
from minikv_jax.sampling import Sampling, sample


class GenerateResult(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; row `b` is valid up to `lengths[b]`, its end-of-sequence token included.
      lengths: int32 `[B]`.
      cache: holds the prompt as the method keeps it and every generated token; `generate(..., cache=cache)` goes on
        from it.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    cache: KVCache


def resolve_method(method: str | CacheConfig) -> CacheConfig:
    """A preset by name, or the config itself."""
    return presets.get(method) if isinstance(method, str) else method


def bucket_length(tokens: int) -> int:
    """The padded length a prompt is run at: multiples of 1/8 of the next power of two, so few programs are compiled."""
    if tokens <= 64:
        return 64
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    method: str | CacheConfig | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    cache: KVCache | None = None,
) -> GenerateResult:
    """Generates from prompts of any lengths under a cache compression method.

    Args:
      prompts: token ids, one sequence per row; rows may differ in length.
      method: a preset's name (`presets.names()`) or a config; None is "minikv", or what made `cache`.
      max_new_tokens: a row ends earlier after an end-of-sequence token.
      sampling: greedy by default.
      key: PRNG key for sampling; needed when `sampling.temperature > 0`.
      eos_token_ids: defaults to the model's; an empty sequence never stops.
      implementation: of the attention ops (`attention.IMPLEMENTATIONS`); None takes the best there is.
      cache: continue a conversation: the prompts are appended to it. It is donated, so use the returned one afterwards.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, more tokens than the model has positions, a
        method that does not fit the model, a cache of another model or batch.
    """
    max_new_tokens = _at_least_one("max_new_tokens", max_new_tokens)
    attention.check_implementation(implementation)
    ids, lengths = _pad_prompts(prompts, model.config.vocab_size)
    if sampling.temperature > 0 and key is None:
        raise ValueError("key=None: sampling with a temperature needs a PRNG key")
    key = jax.random.key(0) if key is None else key
    eos = tuple(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    static = (max_new_tokens, sampling, eos, implementation)
    graphdef, params = nnx.split(model)
    if cache is None:
        config = resolve_method(method or "minikv")
        memory.check_model(model.config, config)
        _check_positions(model, int(lengths.max()), max_new_tokens)
        return _generate(graphdef, params, ids, lengths, key, config, *static)
    _check_cache(model, cache, None if method is None else resolve_method(method), len(prompts))
    _check_positions(model, int((np.asarray(cache.length) + lengths).max()), max_new_tokens)
    missing = ids.shape[1] + max_new_tokens - cache.room()
    if missing > 0:
        cache = cache.grow(bucket_length(missing))
    return _continue(graphdef, params, cache, ids, lengths, key, *static)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def _generate(
    graphdef: nnx.GraphDef,
    params: Any,
    ids: Array,
    lengths: Array,
    key: Array,
    config: CacheConfig,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    implementation: str | None,
) -> GenerateResult:
    model = nnx.merge(graphdef, params)
    hidden, cache = inference.prefill(model, ids, lengths, config, max_new_tokens, implementation)
    logits = model.logits(last_valid(hidden, lengths))
    return _decode_loop(model, cache, logits, key, max_new_tokens, sampling, eos, implementation)


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9), donate_argnums=(2,))
def _continue(
    graphdef: nnx.GraphDef,
    params: Any,
    cache: KVCache,
    ids: Array,
    lengths: Array,
    key: Array,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    implementation: str | None,
) -> GenerateResult:
    model = nnx.merge(graphdef, params)
    hidden, cache = inference.extend(model, cache, ids, lengths, implementation)
    logits = model.logits(last_valid(hidden, lengths))
    return _decode_loop(model, cache, logits, key, max_new_tokens, sampling, eos, implementation)


def last_valid(hidden: Array, lengths: Array) -> Array:
    """The hidden state of each row's last valid token: `[B, T, D]` -> `[B, D]`."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


class _State(NamedTuple):
    step: Array
    logits: Array  # of the token to be drawn next, [B, V]
    tokens: Array  # [B, max_new_tokens]
    active: Array  # bool [B]
    lengths: Array  # [B]
    key: Array
    cache: KVCache


def _decode_loop(
    model: Llama,
    cache: KVCache,
    logits: Array,
    key: Array,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    implementation: str | None,
) -> GenerateResult:
    """Draws a token, runs it through the model, until every row has ended. Every drawn token enters the cache."""
    batch = logits.shape[0]

    def body(state: _State) -> _State:
        key, draw = jax.random.split(state.key)
        active = state.active.astype(jnp.int32)
        token = sample(state.logits, sampling, draw) * active
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        hidden, cache = inference.decode(model, state.cache, token, active, implementation)
        ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(state.active)
        going = state.active & ~ended
        return _State(state.step + 1, model.logits(hidden), tokens, going, state.lengths + active, key, cache)

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & jnp.any(state.active)

    tokens = jnp.zeros((batch, max_new_tokens), jnp.int32)
    start = _State(jnp.int32(0), logits, tokens, jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32), key, cache)
    end = lax.while_loop(unfinished, body, start)
    return GenerateResult(end.tokens, end.lengths, end.cache)


def _pad_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 ids `[B, bucket]` and lengths `[B]`."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one sequence of token ids")
    rows = [np.asarray(prompt) for prompt in prompts]
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise ValueError(f"prompt {index} has shape {row.shape}: expected a non-empty sequence of token ids")
        if not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {index} has dtype {row.dtype}: expected integer token ids")
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.size:
            raise ValueError(f"prompt {index} has token id {outside[0]}: expected 0..{vocab_size - 1}")
    lengths = np.array([row.size for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket_length(int(lengths.max()))), np.int32)
    for index, row in enumerate(rows):
        ids[index, : row.size] = row
    return ids, lengths


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
    return value


def _check_positions(model: Llama, prompt: int, new: int) -> None:
    most = model.config.max_position_embeddings
    if prompt + new > most:
        raise ValueError(f"{prompt} prompt tokens + {new} new ones exceed the model's {most} positions")


def _check_cache(model: Llama, cache: KVCache, method: CacheConfig | None, batch: int) -> None:
    layers, (rows, kv_heads, _, dim) = len(cache.layers), cache.layers[0].tail_k.shape
    config = model.config
    expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    if (layers, kv_heads, dim) != expected:
        raise ValueError(f"cache has (layers, KV heads, head dim) {(layers, kv_heads, dim)}, the model {expected}")
    if rows != batch:
        raise ValueError(f"cache has {rows} rows, prompts {batch}: expected the same")
    made_by = cache.layers[0].config
    if method not in (None, made_by):
        raise ValueError(f"method={method.name!r} is not what made the cache: {made_by}")
