"""Compiled programs of a generation: prefill and decode loop, as one program or as two.

The model's graph, the settings and the method are static; parameters, prompts and caches are arrays.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import meshes
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.decode import decode, extend
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import Llama
from minikv_jax.prefill import last_valid, prefill
from minikv_jax.sampling import Sampling, sample


class GenerateResult(NamedTuple):
    """Result of `generate`, and of each step of `stream`.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`, the generated ids. Row `b` is valid up to `lengths[b]`, which includes its
        end-of-sequence token.
      lengths: int32 `[B]`, number of generated tokens per row.
      cache: the compressed prompt and every generated token; `generate(..., cache=cache)` continues from it.
      finite: bool `[B]`, whether all logits that the row's tokens were drawn from are finite. If not, the tokens are
        meaningless from some step on.
      log_probabilities: float32 `[B, max_new_tokens]`, log-probability of each drawn token under the model (natural
        logarithm, temperature 1); None unless asked for.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    cache: KVCache
    finite: Bool[Array, "B"]
    log_probabilities: Float[Array, "B M"] | None = None


class Settings(NamedTuple):
    """Settings compiled into a program, beside the model and the method."""

    max_new_tokens: int
    sampling: Sampling
    eos: tuple[int, ...]
    implementation: str | None
    log_probabilities: bool


class State(NamedTuple):
    """Carry of the decode loop.

    Attributes:
      step: int32 `[]`, number of tokens drawn so far.
      logits: float32 `[B, V]`, from which the next token is drawn.
      tokens, log_probabilities: `[B, max_new_tokens]`, as in `GenerateResult`.
      active: bool `[B]`, rows that have not ended.
      lengths: int32 `[B]`, number of generated tokens per row.
      finite: bool `[B]`, as in `GenerateResult`.
      key: PRNG key of the tokens to come.
      cache: the prompt and all tokens drawn so far.
    """

    step: Array
    logits: Array
    tokens: Array
    log_probabilities: Array | None
    active: Array
    lengths: Array
    finite: Array
    key: Array
    cache: KVCache

    def result(self) -> GenerateResult:
        """Returns what has been generated so far, with the tokens on every device."""
        shown = self.tokens, self.lengths, self.finite, self.log_probabilities
        tokens, lengths, finite, log_probabilities = meshes.constrain(shown)
        return GenerateResult(tokens, lengths, self.cache, finite, log_probabilities)

    def placed(self) -> State:
        """Splits the state's rows and heads over the mesh as they stay during decoding."""
        whole, cache = {"step", "key"}, meshes.constrain(self.cache, *meshes.AXES)
        others = {
            name: meshes.constrain(value, *() if name in whole else (meshes.DATA,))
            for name, value in self._asdict().items()
            if name != "cache"
        }
        return State(**others, cache=cache)


class Programs(NamedTuple):
    """The two compiled programs of a generation.

    Attributes:
      prefill: `(params, cache, ids, lengths, key) -> State`. `cache` is None, or a cache to continue from, which is
        donated.
      decode: `(params, state, last) -> State`, decodes up to step `last` (int32); the state is donated.
      state: shapes and dtypes of the state between them.
      compile_s: seconds that each took to trace and compile.
    """

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    state: State
    compile_s: dict[str, float]


class Inputs(NamedTuple):
    """Arrays that a generation starts with."""

    cache: KVCache | None
    ids: Any  # int32 [B, T]
    lengths: Any  # int32 [B]
    key: Array


def compile_programs(graphdef: Any, settings: Settings, method: Method | None, params: Any, inputs: Inputs) -> Programs:
    """Compiles prefill and decode, from arrays or from their shapes."""
    begin = time.perf_counter()
    first = start.lower(graphdef, settings, method, params, *inputs).compile()
    middle = time.perf_counter()
    shapes = jax.eval_shape(functools.partial(start, graphdef, settings, method), params, *inputs)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, first.output_shardings
    )
    rest = decode_until.lower(graphdef, settings, params, state, np.int32(0)).compile()
    compile_s = {"prefill": middle - begin, "decode": time.perf_counter() - middle}
    return Programs(first, rest, state, compile_s)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def run(
    graphdef, settings: Settings, method: Method | None, params, cache: KVCache | None, ids, lengths, key
) -> GenerateResult:
    """Runs a whole generation in one program."""
    model = nnx.merge(graphdef, params)
    state = _begin(model, settings, method, Inputs(cache, ids, lengths, key))
    return _loop(model, settings, state, settings.max_new_tokens).result()


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def start(
    graphdef, settings: Settings, method: Method | None, params, cache: KVCache | None, ids, lengths, key
) -> State:
    """Runs the prompts into a new cache, or appends them to the given one."""
    return _begin(nnx.merge(graphdef, params), settings, method, Inputs(cache, ids, lengths, key))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def decode_until(graphdef, settings: Settings, params, state: State, last: Array) -> State:
    """Decodes until step `last`, or until every row has ended."""
    return _loop(nnx.merge(graphdef, params), settings, state, last)


def _begin(model: Llama, settings: Settings, method: Method | None, inputs: Inputs) -> State:
    """Runs the prompts into a new cache, or appends them to the given one."""
    cache, ids, lengths, key = inputs
    if cache is None:
        assert method is not None
        hidden, cache = prefill(model, ids, lengths, method, settings.max_new_tokens, settings.implementation)
    else:
        hidden, cache = extend(model, cache, ids, lengths, settings.implementation)
        hidden = last_valid(hidden, lengths)
    batch, size = hidden.shape[0], settings.max_new_tokens
    return State(
        step=jnp.int32(0),
        logits=model.logits(hidden),
        tokens=jnp.zeros((batch, size), jnp.int32),
        log_probabilities=jnp.zeros((batch, size), jnp.float32) if settings.log_probabilities else None,
        active=jnp.ones(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        finite=jnp.ones(batch, bool),
        key=key,
        cache=cache,
    ).placed()


def _loop(model: Llama, settings: Settings, state: State, last: Array | int) -> State:
    """Draws tokens and runs them through the model, until step `last` or until every row has ended.

    Every drawn token enters the cache, the last one included, so the cache is always complete.
    """

    def body(state: State) -> State:
        with jax.named_scope("sampling"):
            key, draw = jax.random.split(state.key)
            active = state.active.astype(jnp.int32)
            token = sample(state.logits, settings.sampling, draw) * active
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
        log_probabilities = state.log_probabilities
        if log_probabilities is not None:
            drawn = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)
            log_probabilities = put(log_probabilities, drawn * active[:, None])
        hidden, cache = decode(model, state.cache, token, active, settings.implementation)
        logits = model.logits(hidden)
        with jax.named_scope("sampling"):
            ended = jnp.isin(token, jnp.asarray(settings.eos, jnp.int32))
            return State(
                step=state.step + 1,
                logits=logits,
                tokens=put(state.tokens, token[:, None]),
                log_probabilities=log_probabilities,
                active=state.active & ~ended,
                lengths=state.lengths + active,
                finite=state.finite & (jnp.isfinite(state.logits).all(axis=-1) | ~state.active),
                key=key,
                cache=cache,
            ).placed()

    return lax.while_loop(lambda state: (state.step < last) & jnp.any(state.active), body, state)
