"""Text generation: one jit-compiled program per shape runs prefill, compression and the whole decode loop.

`generate` is that program; `stream` cuts the loop into compiled chunks, so that a terminal can show text as it comes.
Both run the same steps and draw the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import inference
from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache
from minikv_jax.checks import integer
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.ops import dispatch as kernels
from minikv_jax.sampling import Sampling, sample


class GenerateResult(NamedTuple):
    """What `generate` returns, and `stream` yields.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; row `b` is valid up to `lengths[b]`, its end-of-sequence token included.
      lengths: int32 `[B]`.
      cache: holds the prompt as the method keeps it and every generated token; `generate(..., cache=cache)` goes on
        from it.
      log_probabilities: float32 `[B, max_new_tokens]` of the drawn tokens under the model (temperature 1), if asked
        for.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    cache: KVCache
    log_probabilities: Float[Array, "B M"] | None = None


class _Settings(NamedTuple):
    """What is compiled into a program."""

    max_new_tokens: int
    sampling: Sampling
    eos: tuple[int, ...]
    implementation: str | None
    log_probabilities: bool


class _State(NamedTuple):
    """The decode loop's carry."""

    step: Array
    logits: Array  # of the token to be drawn next, [B, V]
    tokens: Array  # [B, max_new_tokens]
    log_probabilities: Array | None
    active: Array  # bool [B]
    lengths: Array  # [B]
    key: Array
    cache: KVCache

    def result(self) -> GenerateResult:
        return GenerateResult(self.tokens, self.lengths, self.cache, self.log_probabilities)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"],
    *,
    cache: str | CacheConfig | KVCache = "minikv",
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    log_probabilities: bool = False,
) -> GenerateResult:
    """Generates from prompts of any lengths with a compressed cache.

    Args:
      prompts: token ids, one sequence per row; rows may differ in length. Lengths are padded up to a bucket
        (`bucket_length`), so that a new length rarely compiles; the result does not depend on it.
      cache: a method for new prompts, by name (`presets.names()`) or as a config; or the cache of an earlier call, to
        which the prompts are appended. A cache is donated: use the returned one afterwards.
      max_new_tokens: a row ends earlier after an end-of-sequence token.
      sampling: greedy by default.
      key: PRNG key for sampling; needed when `sampling.temperature > 0`.
      eos_token_ids: defaults to the model's; an empty sequence never stops.
      implementation: of the attention ops (`kernels.IMPLEMENTATIONS`); None takes the best there is.
      log_probabilities: also return those of the drawn tokens.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, more tokens than the model has positions, a method
        that does not fit the model, a cache of another model, dtype or batch or that was donated, an argument of
        another type.
    """
    settings = _settings(model, max_new_tokens, sampling, key, eos_token_ids, implementation, log_probabilities)
    ids, lengths, cache = _prepare(model, prompts, cache, settings)
    key = jax.random.key(0) if key is None else key
    graphdef, params = nnx.split(model)
    if isinstance(cache, KVCache):
        return _continue(graphdef, settings, params, cache, ids, lengths, key)
    return _generate(graphdef, settings, cache, params, ids, lengths, key)


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"],
    *,
    cache: str | CacheConfig | KVCache = "minikv",
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    log_probabilities: bool = False,
    chunk: int = 16,
) -> Iterator[GenerateResult]:
    """`generate` in steps: yields after the prefill (no tokens yet) and then after every `chunk` tokens.

    Each result holds all that has been generated so far. Its cache is donated to the next step: only the last one's
    may be kept. Arguments and errors are those of `generate`. Errors are raised, and the programs compiled, before the
    iterator is returned: what the iterator then takes is prefill and decoding.
    """
    chunk = integer("chunk", chunk, 1)
    settings = _settings(model, max_new_tokens, sampling, key, eos_token_ids, implementation, log_probabilities)
    ids, lengths, cache = _prepare(model, prompts, cache, settings)
    key = jax.random.key(0) if key is None else key
    graphdef, params = nnx.split(model)

    program: Any
    if isinstance(cache, KVCache):
        program, static, arguments = _extend_only, (graphdef, settings), (params, cache, ids, lengths, key)
    else:
        program, static, arguments = _prefill_only, (graphdef, settings, cache), (params, ids, lengths, key)
    prefill = program.lower(*static, *arguments).compile()
    state = jax.eval_shape(functools.partial(program, *static), *arguments)
    decode = _decode_chunk.lower(graphdef, settings, params, state, np.int32(0)).compile()

    def steps() -> Iterator[GenerateResult]:
        state: _State = prefill(*arguments)
        yield state.result()
        for last in range(chunk, settings.max_new_tokens + chunk, chunk):
            if not bool(jnp.any(state.active)):
                return
            state = decode(params, state, np.int32(min(last, settings.max_new_tokens)))
            yield state.result()

    return steps()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graphdef, settings: _Settings, config: CacheConfig, params, ids, lengths, key) -> GenerateResult:
    model = nnx.merge(graphdef, params)
    state = _prefill(model, settings, config, ids, lengths, key)
    return _decode_until(model, settings, state, settings.max_new_tokens).result()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _continue(graphdef, settings: _Settings, params, cache: KVCache, ids, lengths, key) -> GenerateResult:
    model = nnx.merge(graphdef, params)
    state = _extend(model, settings, cache, ids, lengths, key)
    return _decode_until(model, settings, state, settings.max_new_tokens).result()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill_only(graphdef, settings: _Settings, config: CacheConfig, params, ids, lengths, key) -> _State:
    return _prefill(nnx.merge(graphdef, params), settings, config, ids, lengths, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _extend_only(graphdef, settings: _Settings, params, cache: KVCache, ids, lengths, key) -> _State:
    return _extend(nnx.merge(graphdef, params), settings, cache, ids, lengths, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _decode_chunk(graphdef, settings: _Settings, params, state: _State, last: Array) -> _State:
    return _decode_until(nnx.merge(graphdef, params), settings, state, last)


def _prefill(model: Llama, settings: _Settings, config: CacheConfig, ids: Array, lengths: Array, key: Array) -> _State:
    hidden, cache = inference.prefill(model, ids, lengths, config, settings.max_new_tokens, settings.implementation)
    return _start(model, settings, hidden, cache, key)


def _extend(model: Llama, settings: _Settings, cache: KVCache, ids: Array, lengths: Array, key: Array) -> _State:
    hidden, cache = inference.extend(model, cache, ids, lengths, settings.implementation)
    return _start(model, settings, inference.last_valid(hidden, lengths), cache, key)


def _start(model: Llama, settings: _Settings, hidden: Array, cache: KVCache, key: Array) -> _State:
    batch, size = hidden.shape[0], settings.max_new_tokens
    return _State(
        step=jnp.int32(0),
        logits=model.logits(hidden),
        tokens=jnp.zeros((batch, size), jnp.int32),
        log_probabilities=jnp.zeros((batch, size), jnp.float32) if settings.log_probabilities else None,
        active=jnp.ones(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        key=key,
        cache=cache,
    )


def _decode_until(model: Llama, settings: _Settings, state: _State, last: Array | int) -> _State:
    """Draws a token and runs it through the model, until step `last` or until every row has ended.

    Every drawn token enters the cache, so that a cache is always complete.
    """

    def body(state: _State) -> _State:
        key, draw = jax.random.split(state.key)
        active = state.active.astype(jnp.int32)
        token = sample(state.logits, settings.sampling, draw) * active
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
        log_probabilities = state.log_probabilities
        if log_probabilities is not None:
            drawn = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)
            log_probabilities = put(log_probabilities, drawn * active[:, None])
        hidden, cache = inference.decode(model, state.cache, token, active, settings.implementation)
        ended = jnp.isin(token, jnp.asarray(settings.eos, jnp.int32))
        return _State(
            step=state.step + 1,
            logits=model.logits(hidden),
            tokens=put(state.tokens, token[:, None]),
            log_probabilities=log_probabilities,
            active=state.active & ~ended,
            lengths=state.lengths + active,
            key=key,
            cache=cache,
        )

    return lax.while_loop(lambda state: (state.step < last) & jnp.any(state.active), body, state)


def resolve_method(method: str | CacheConfig) -> CacheConfig:
    """A preset by name, or the config itself; ValueError for anything else."""
    if isinstance(method, CacheConfig):
        return method
    return presets.get(method)


def bucket_length(tokens: int, most: int | None = None) -> int:
    """The padded length a prompt is run at: multiples of 1/8 of the next power of two, so few programs are compiled.

    `most`, the model's positions, caps it: a prompt that fits is never padded beyond them.
    """
    step = 64 if tokens <= 64 else 1 << ((tokens - 1).bit_length() - 3)
    bucket = -(-tokens // step) * step
    return bucket if most is None else max(min(bucket, most), tokens)


def _settings(
    model: Llama,
    max_new_tokens: int,
    sampling: Sampling,
    key: Array | None,
    eos_token_ids: Sequence[int] | None,
    implementation: str | None,
    log_probabilities: bool,
) -> _Settings:
    if not isinstance(model, Llama):
        raise ValueError(f"model is a {type(model).__name__}: expected a Llama, the first of what load gives")
    new = integer("max_new_tokens", max_new_tokens, 1)
    kernels.check_implementation(implementation)
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling={sampling!r}: expected a minikv_jax.Sampling")
    if sampling.temperature > 0 and key is None:
        raise ValueError("key=None: sampling with a temperature needs a PRNG key")
    if key is not None and not isinstance(key, jax.Array):
        raise ValueError(f"key={key!r}: expected a PRNG key, such as jax.random.key(0)")
    eos = model.config.eos_token_ids if eos_token_ids is None else _stop_tokens(eos_token_ids, model.config.vocab_size)
    return _Settings(new, sampling, eos, implementation, log_probabilities)


def _stop_tokens(given: Any, vocab_size: int) -> tuple[int, ...]:
    ids = np.asarray(given).tolist()
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"eos_token_ids={given!r}: expected a sequence of token ids, 0..{vocab_size - 1}")
    return tuple(ids)


def _prepare(
    model: Llama, prompts: Any, cache: str | CacheConfig | KVCache, settings: _Settings
) -> tuple[np.ndarray, np.ndarray, CacheConfig | KVCache]:
    """Padded ids, lengths, and the config or the cache with enough room: all that can be wrong is found here."""
    ids, lengths = _pad_prompts(prompts, model.config.vocab_size, model.config.max_position_embeddings)
    new = settings.max_new_tokens
    if not isinstance(cache, KVCache):
        if not isinstance(cache, str | CacheConfig):
            kind = type(cache).__name__  # a value may be large
            raise ValueError(f"cache is a {kind}: expected a method's name, a CacheConfig or an earlier result's cache")
        config = resolve_method(cache)
        memory.check_model(model.config, config)
        _check_positions(model, int(lengths.max()), new)
        return ids, lengths, config
    _check_cache(model, cache, len(lengths))
    seen = np.asarray(cache.length)
    longest = int((seen + lengths).argmax())
    _check_positions(model, int(lengths[longest]), new, int(seen[longest]))
    missing = ids.shape[1] + new - cache.room()
    return ids, lengths, cache.grow(bucket_length(missing)) if missing > 0 else cache


def _pad_prompts(prompts: Any, vocab_size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 ids `[B, bucket]` and lengths `[B]`."""
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array) or isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r}: expected sequences of token ids, one a row")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one sequence of token ids")
    rows = [_row(index, prompt) for index, prompt in enumerate(prompts)]
    for index, row in enumerate(rows):
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.size:
            raise ValueError(f"prompt {index} has token id {outside[0]}: expected 0..{vocab_size - 1}")
    lengths = np.array([row.size for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket_length(int(lengths.max()), most)), np.int32)
    for index, row in enumerate(rows):
        ids[index, : row.size] = row
    return ids, lengths


def _row(index: int, prompt: Any) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"prompt {index} is no sequence of token ids: {error}") from error
    if row.ndim != 1 or row.size == 0:
        raise ValueError(f"prompt {index} has shape {row.shape}: expected a non-empty sequence of token ids")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"prompt {index} has dtype {row.dtype}: expected integer token ids")
    return row


def _check_positions(model: Llama, prompt: int, new: int, seen: int = 0) -> None:
    most = model.config.max_position_embeddings
    if seen + prompt + new > most:
        before = f"{seen} tokens of the cache + " if seen else ""
        raise ValueError(f"{before}{prompt} prompt tokens + {new} new ones exceed the model's {most} positions")


def _check_cache(model: Llama, cache: KVCache, batch: int) -> None:
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache) if isinstance(leaf, jax.Array)):
        raise ValueError("cache was donated to another call: use the one that it returned")
    layers, (rows, kv_heads, _, dim) = len(cache.layers), cache.layers[0].tail_k.shape
    config = model.config
    expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    if (layers, kv_heads, dim) != expected:
        raise ValueError(f"cache has (layers, KV heads, head dim) {(layers, kv_heads, dim)}, the model {expected}")
    if (dtype := cache.layers[0].tail_k.dtype) != model.dtype:
        raise ValueError(f"cache has dtype {dtype}, the model {jnp.dtype(model.dtype)}: expected the same")
    if rows != batch:
        raise ValueError(f"cache has {rows} rows, prompts {batch}: expected the same")
