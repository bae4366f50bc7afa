"""Text generation: one jit-compiled program per shape runs prefill, compression and the whole decode loop.

`generate` is that program. `stream` splits it into two, prefill and a chunk of decode steps, so that a terminal can
show text as it comes. `compile_ahead` compiles these two from shapes. All run the same steps and draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from minikv_jax import meshes
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.checks import flag, integer, shown
from minikv_jax.methods import contracts
from minikv_jax.methods.base import MAX_TOKENS
from minikv_jax.methods.lookup import resolve
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import Llama
from minikv_jax.ops.dispatch import check_implementation
from minikv_jax.programs import GenerateResult, Inputs, Programs, Settings, State, compile_programs, run
from minikv_jax.prompts import (
    bucket_length,
    check_cache,
    check_devices,
    check_positions,
    check_rows,
    check_second_run,
    pad_prompts,
)
from minikv_jax.sampling import Sampling

DEFAULT_METHOD = "minikv"


class Arguments(TypedDict, total=False):
    """Keyword arguments of `generate`, for functions that pass them on."""

    method: str | Method | None
    cache: KVCache | None
    max_new_tokens: int
    sampling: Sampling
    key: Array | None
    eos_token_ids: Sequence[int] | None
    implementation: str | None
    log_probabilities: bool


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"],
    *,
    method: str | Method | None = None,
    cache: KVCache | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    log_probabilities: bool = False,
) -> GenerateResult:
    """Generates tokens from prompts of any lengths, with a compressed cache.

    Args:
      model: the model, from `load` for example. On a mesh, prompts must be a multiple of its axis "data".
      prompts: token ids, one sequence per row; rows may differ in length. Lengths are padded up to a bucket
        (`bucket_length`), so that a new length rarely compiles; the result does not depend on it.
      method: compresses new prompts: a `Method`, or a name (`minikv methods` lists them); "minikv" by default.
      cache: cache of an earlier result, to which the prompts are appended; it keeps its own method. It is donated: use
        the returned cache afterwards.
      max_new_tokens: most tokens to generate per row; an end-of-sequence token ends a row earlier.
      sampling: settings of the draw; greedy by default.
      key: PRNG key for sampling; needed if `sampling.temperature > 0`.
      eos_token_ids: ids that end a row; by default the model's. An empty sequence never stops.
      implementation: "xla", "pallas" or "cuda", for all ops; by default the fastest recorded for this GPU.
      log_probabilities: whether to return the log-probability of every drawn token.

    Returns:
      The generated tokens and their number per row, the cache to continue from, and whether all logits were finite.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, more tokens than the model has positions, a method
        that does not fit the model, both a method and a cache, a cache of another model, dtype or batch or one that was
        donated, an argument of another type.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    request = _request(
        model,
        prompts,
        method=method,
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
        eos_token_ids=eos_token_ids,
        implementation=implementation,
        log_probabilities=log_probabilities,
    )
    graphdef, params = nnx.split(model)
    with meshes.use(model.mesh):
        return run(graphdef, request.settings, request.method, params, *request.inputs)


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"],
    *,
    chunk: int = 16,
    **arguments: Unpack[Arguments],
) -> Iterator[GenerateResult]:
    """Generates in steps: yields a result after the prefill and then after every `chunk` tokens.

    Draws the same tokens as `generate`. Arguments are checked and the programs compiled before the iterator is
    returned; the iterator itself only runs prefill and decoding.

    Args:
      model: as for `generate`.
      prompts: token ids, one sequence per row, as for `generate`.
      chunk: tokens per step, at least 1.
      arguments: the other keyword arguments of `generate`.

    Returns:
      An iterator over results, each with everything generated so far; the first one has no tokens. The cache of a
      result is donated to the next step, so only the last result's cache can be kept.

    Raises:
      ValueError: as `generate`, or a `chunk` below 1.
      NotImplementedError: as `generate`.
    """
    chunk = integer("chunk", chunk, 1)
    settings, method, inputs = _request(model, prompts, **arguments)
    graphdef, params = nnx.split(model)
    with meshes.use(model.mesh):
        programs = compile_programs(graphdef, settings, method, params, inputs)

    def result(state: State) -> GenerateResult:
        with meshes.use(model.mesh):
            return state.result()

    def steps() -> Iterator[GenerateResult]:
        state: State = programs.prefill(params, *inputs)
        yield result(state)
        for last in range(chunk, settings.max_new_tokens + chunk, chunk):
            if not bool(jnp.any(state.active)):
                return
            state = programs.decode(params, state, np.int32(min(last, settings.max_new_tokens)))
            yield result(state)

    return steps()


def compile_ahead(
    model: Llama,
    batch: int,
    prompt_tokens: int,
    *,
    method: str | Method = DEFAULT_METHOD,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    log_probabilities: bool = False,
) -> Programs:
    """Compiles the programs of `stream` from shapes, without prompts and, if you like, without weights.

    Args:
      model: a model, or its shapes only: `nnx.eval_shape(lambda: Llama(...))`.
      batch: rows.
      prompt_tokens: length of the longest prompt in tokens; it is padded to its bucket.
      method: a `Method` or a name.
      max_new_tokens: most tokens to generate per row.
      sampling, eos_token_ids, implementation, log_probabilities: as for `generate`.

    Returns:
      The compiled programs, the shapes of the state between them, and the seconds that each took to compile.

    Raises:
      ValueError: as `generate`, or a `batch` or `prompt_tokens` below 1.
      NotImplementedError: as `generate`.
    """
    settings = _settings(model, max_new_tokens, sampling, eos_token_ids, implementation, log_probabilities)
    method = resolve(method)
    contracts.check(method, model.config)
    integer("batch", batch, 1, MAX_TOKENS)
    integer("prompt_tokens", prompt_tokens, 1)
    check_positions(model, prompt_tokens, settings.max_new_tokens)
    check_second_run(model, prompt_tokens, method)
    graphdef, params = nnx.split(model)
    tokens = bucket_length(prompt_tokens, model.config.max_position_embeddings)
    check_rows(batch, model.mesh)
    rows = None if model.mesh is None else meshes.sharding(model.mesh, meshes.DATA)
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((batch, tokens), (batch,)))
    with meshes.use(model.mesh):
        return compile_programs(graphdef, settings, method, params, Inputs(None, ids, lengths, jax.random.key(0)))


class _Request(NamedTuple):
    """A checked request to generate. `method` is None if there is a cache to continue from."""

    settings: Settings
    method: Method | None
    inputs: Inputs


def _request(
    model: Llama,
    prompts: Any,
    *,
    method: str | Method | None = None,
    cache: KVCache | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_token_ids: Sequence[int] | None = None,
    implementation: str | None = None,
    log_probabilities: bool = False,
) -> _Request:
    """Checks the arguments of `generate`, pads the prompts, and gives a cache enough room."""
    settings = _settings(model, max_new_tokens, sampling, eos_token_ids, implementation, log_probabilities)
    if sampling.temperature > 0 and key is None:
        raise ValueError("key=None: sampling with a temperature needs a PRNG key")
    key = jax.random.key(0) if key is None else _one_key(key)
    ids, lengths = pad_prompts(prompts, model.config.vocab_size, model.config.max_position_embeddings)
    check_rows(len(lengths), model.mesh)
    check_devices(model, None)
    if cache is None:
        method = resolve(DEFAULT_METHOD if method is None else method)
        contracts.check(method, model.config)
        check_positions(model, int(lengths.max()), settings.max_new_tokens)
        check_second_run(model, int(lengths.max()), method)
        return _Request(settings, method, _placed(model, Inputs(None, ids, lengths, key)))
    if method is not None:
        raise ValueError("both method and cache are given: a cache goes on with its own method")
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}: expected an earlier result's cache")
    check_cache(model, cache, len(lengths))
    check_devices(model, cache)
    seen = meshes.to_host(cache.length)
    longest = int((seen + lengths).argmax())
    check_positions(model, int(lengths[longest]), settings.max_new_tokens, int(seen[longest]))
    missing = ids.shape[1] + settings.max_new_tokens - cache.room()
    if missing > 0:
        cache = cache.grow(bucket_length(missing))
    return _Request(settings, None, _placed(model, Inputs(cache, ids, lengths, key)))


def _one_key(key: Any) -> Array:
    """Returns the key. Raises ValueError unless it is one PRNG key, of `jax.random.key` or `jax.random.PRNGKey`."""
    try:
        is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        single = key if is_typed else jax.random.wrap_key_data(key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key={shown(key)}: expected a PRNG key, such as jax.random.key(0)") from error
    if single.shape:
        raise ValueError(f"key has shape {single.shape}: expected one PRNG key, such as jax.random.key(0)")
    return key


def _placed(model: Llama, inputs: Inputs) -> Inputs:
    """Places the inputs on the model's mesh, if there is one. The cache is there already."""
    if model.mesh is None:
        return inputs
    ids, lengths = meshes.place((inputs.ids, inputs.lengths), model.mesh, meshes.DATA)
    return Inputs(inputs.cache, ids, lengths, meshes.place(inputs.key, model.mesh))


def _settings(
    model: Llama,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Sequence[int] | None,
    implementation: str | None,
    log_probabilities: bool,
) -> Settings:
    if not isinstance(model, Llama):
        raise ValueError(f"model is a {type(model).__name__}: expected a Llama, the first value that load returns")
    new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    flag("log_probabilities", log_probabilities)
    check_implementation(implementation)
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling={sampling!r}: expected a minikv_jax.Sampling")
    eos = model.config.eos_token_ids if eos_token_ids is None else _stop_tokens(eos_token_ids, model.config.vocab_size)
    return Settings(new_tokens, sampling, eos, implementation, log_probabilities)


def _stop_tokens(given: Any, vocab_size: int) -> tuple[int, ...]:
    try:
        ids = np.asarray(given).tolist()
    except ValueError:  # lists of several lengths
        ids = None
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"eos_token_ids={shown(given)}: expected a sequence of token ids, 0..{vocab_size - 1}")
    return tuple(ids)
