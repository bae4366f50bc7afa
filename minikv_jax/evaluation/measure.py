"""What a method does to one prompt, measured: the model runs the prompt once, and every method compresses that run.

Sharing the prefill is exact: attention over the prompt is full and does not depend on the method. All layers' queries,
keys and values are held meanwhile. Then, per method, the true continuation is fed token by token through the compressed
cache ("teacher forcing"), as generation would do it, and the logits are compared with those of the full cache; or text
is generated greedily. Both are one compiled program per method, padded prompt length and number of new tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import inference, memory, presets
from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig, ModelConfig
from minikv_jax.evaluation.task import Case
from minikv_jax.generate import bucket_length
from minikv_jax.model import Llama
from minikv_jax.schemes import SCORERS
from minikv_jax.selection import Kept


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method on one case.

    Attributes:
      finite: whether every logit was a finite number. If not, the five numbers below are None.
      nll, full_nll: negative log-likelihood of the true continuation under the method and under the full cache, nats
        per token; None without a continuation, as are the next three.
      kl_to_full: KL divergence from the full cache's next-token distribution to the method's, nats per token.
      top1_agreement: share of positions where both have the same most likely token.
      exact_match: whether greedy generation of as many tokens gives the continuation.
      generated: token ids of the greedy answer, without what ended it; None where no text was asked for.
      cache_bytes, full_cache_bytes: allocated for the padded prompt and the new tokens.
    """

    finite: bool
    nll: float | None
    full_nll: float | None
    kl_to_full: float | None
    top1_agreement: float | None
    exact_match: bool | None
    generated: tuple[int, ...] | None
    cache_bytes: int
    full_cache_bytes: int


def padded_length(model: ModelConfig, case: Case) -> int:
    """The length that the case's prompt is run at."""
    return bucket_length(len(case.prompt), model.max_position_embeddings)


def check_case(model: ModelConfig, case: Case, new_tokens: int) -> None:
    """Raises ValueError where a case is empty, too long for the model, or has ids outside the vocabulary."""
    if not case.prompt or not case.new_tokens:
        raise ValueError(
            f"{case.name}: {len(case.prompt)} prompt and {case.new_tokens} new tokens: expected at least 1 each"
        )
    most = model.max_position_embeddings
    if len(case.prompt) + new_tokens > most:
        raise ValueError(
            f"{case.name}: {len(case.prompt)} prompt + {new_tokens} new tokens exceed the model's {most} positions"
        )
    for token in (*case.prompt, *case.continuation):
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"{case.name}: token id {token} is outside the vocabulary of {model.vocab_size}")


def measure(
    model: Llama,
    cases: Sequence[Case],
    methods: Mapping[str, CacheConfig],
    new_tokens: int,
    implementation: str | None = None,
) -> list[dict[str, Measurement]]:
    """Every method on cases that are run as one batch.

    Args:
      cases: of one padded length (`padded_length`).
      new_tokens: room in the caches, at least every case's `new_tokens`.
      implementation: of the attention ops.

    Returns:
      Per case, each method's measurement.

    Raises:
      ValueError: a case or a method that does not fit the model.
    """
    for case in cases:
        check_case(model.config, case, new_tokens)
    for config in methods.values():
        memory.check_model(model.config, config)
    batch = _batch(model.config, cases, new_tokens)
    graphdef, params = nnx.split(model)
    sums = any(needs_column_sums(config) for config in methods.values())
    hidden, layers = prefill_layers(graphdef, params, batch.ids, batch.lengths, sums, implementation)
    full = presets.get("full")
    full_bytes = memory.report(
        model.config, full, prompt_length=batch.ids.shape[1], max_new_tokens=new_tokens, dtype=model.dtype.name
    ).bytes

    def run(config: CacheConfig, *, answer: bool) -> _Run:
        cache, _ = compress_layers(model.config, config, layers, batch.lengths, new_tokens, implementation)
        decode = functools.partial(_decode, graphdef, params, cache, hidden, batch, implementation=implementation)
        forced = decode(jnp.asarray(batch.known)) if batch.known.any() else None
        answered = decode(jnp.zeros_like(batch.known)) if answer and batch.wanted.any() else None
        return _Run(cache.nbytes // len(cases), forced, answered)

    # One method at a time: a run's logits are large, and only those of the full cache are needed again.
    whole = run(full, answer=full in methods.values())
    found = {
        config: _measurements(whole if config == full else run(config, answer=True), whole.forced, batch, full_bytes)
        for config in set(methods.values())
    }
    results: list[dict[str, Measurement]] = [{} for _ in cases]
    for name, config in methods.items():
        for row, measurement in enumerate(found[config][: len(cases)]):
            results[row][name] = measurement
    return results


class _Batch(NamedTuple):
    """Cases as arrays."""

    ids: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B]
    truth: np.ndarray  # int32 [B, M]
    known: np.ndarray  # int32 [B], tokens of the continuation
    wanted: np.ndarray  # int32 [B], tokens to generate at most
    stop: np.ndarray  # int32 [B, E], padded with -1


class _Decoded(NamedTuple):
    tokens: Int[Array, "B M"]  # -1 beyond a row's end
    logits: Float[Array, "B M V"]
    finite: Bool[Array, "B"]


class _Run(NamedTuple):
    cache_bytes: int
    forced: _Decoded | None
    answered: _Decoded | None


def _batch(model: ModelConfig, cases: Sequence[Case], new_tokens: int) -> _Batch:
    lengths = {padded_length(model, case) for case in cases}
    if len(lengths) != 1:
        raise ValueError(f"cases of padded lengths {sorted(lengths)}: expected one length per batch")
    stops = [(*model.eos_token_ids, *case.stop) for case in cases]
    return _Batch(
        _padded([case.prompt for case in cases], lengths.pop(), 0),
        np.array([len(case.prompt) for case in cases], np.int32),
        _padded([case.continuation for case in cases], new_tokens, 0),
        np.array([len(case.continuation) for case in cases], np.int32),
        np.array([case.max_new_tokens for case in cases], np.int32),
        _padded(stops, max(8, *map(len, stops)), -1),
    )


def _padded(rows: Sequence[Sequence[int]], size: int, filler: int) -> np.ndarray:
    array = np.full((len(rows), size), filler, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def needs_column_sums(config: CacheConfig) -> bool:
    """Whether the method's scorer reads column sums, a second pass over the prompt's attention."""
    return SCORERS[config.scorer].needs_column_sums


def _measurements(run: _Run, reference: _Decoded | None, batch: _Batch, full_bytes: int) -> list[Measurement]:
    """Each row's numbers."""
    rows = len(batch.lengths)
    finite = np.ones(rows, bool)
    values: list[np.ndarray] = []
    if run.forced is not None and reference is not None:
        finite &= np.asarray(run.forced.finite)
        values = [np.asarray(x) for x in _fidelity(reference.logits, run.forced.logits, batch.truth, batch.known)]
    answers: list[tuple[int, ...] | None] = [None] * rows
    if run.answered is not None:
        tokens = np.asarray(run.answered.tokens)
        finite &= np.asarray(run.answered.finite) | (batch.wanted == 0)
        answers = [
            tuple(t for t in tokens[row].tolist() if t >= 0 and t not in batch.stop[row]) if wanted else None
            for row, wanted in enumerate(batch.wanted)
        ]
    found = []
    for row in range(rows):
        known = values if batch.known[row] and finite[row] else ()
        nll, full_nll, kl, agreement, exact = (x[row].item() for x in known) if known else (None,) * 5
        found.append(
            Measurement(
                bool(finite[row]), nll, full_nll, kl, agreement, exact, answers[row], run.cache_bytes, full_bytes
            )
        )
    return found


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def prefill_layers(
    graphdef: nnx.GraphDef,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    column_sums: bool,
    implementation: str | None,
) -> tuple[Float[Array, "B D"], list[tuple[Array, Array, Array, Array | None]]]:
    """The hidden state of each row's last token, and each layer's q, k, v and column sums."""
    layers = []
    hidden = inference.run_prompt(
        nnx.merge(graphdef, params),
        ids,
        lengths,
        lambda inputs: layers.append((inputs.q, inputs.k, inputs.v, inputs.column_sums)),
        column_sums,
        implementation,
    )
    return inference.last_valid(hidden, lengths), layers


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def compress_layers(
    model: ModelConfig,
    config: CacheConfig,
    layers: list[tuple[Array, Array, Array, Array | None]],
    lengths: Int[Array, "B"],
    new_tokens: int,
    implementation: str | None,
) -> tuple[KVCache, list[Kept]]:
    """The cache that a method keeps of `prefill_layers`' prompt, and which tokens it holds in each layer."""
    compressor = inference.Compressor(model, config, layers[0][1].shape[1], new_tokens, implementation)
    for layer, (q, k, v, sums) in enumerate(layers):
        compressor.add(inference.scorer_inputs(model, layer, q, k, v, lengths, sums))
    return compressor.cache(lengths), compressor.kept


@functools.partial(jax.jit, static_argnames=("graphdef", "implementation"))
def _decode(
    graphdef: nnx.GraphDef,
    params: Any,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    batch: _Batch,
    forced: Int[Array, "B"],
    *,
    implementation: str | None,
) -> _Decoded:
    """Feeds each row's first `forced[b]` true tokens; or, where all are 0, generates up to `wanted[b]` greedily."""
    model = nnx.merge(graphdef, params)
    forcing = jnp.any(forced > 0)
    steps = jnp.where(forcing, forced, batch.wanted)
    rows, size = batch.truth.shape

    def body(state: tuple) -> tuple:
        step, active, hidden, cache, tokens, all_logits, finite = state
        logits = model.logits(hidden)
        finite &= jnp.all(jnp.isfinite(logits), axis=-1) | ~active
        token = jnp.where(forcing, batch.truth[:, step], jnp.argmax(logits, axis=-1).astype(jnp.int32))
        token = jnp.where(active, token, 0)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
        tokens = put(tokens, jnp.where(active, token, -1)[:, None])
        all_logits = put(all_logits, logits[:, None])
        ended = ~forcing & jnp.any(token[:, None] == batch.stop, axis=1)
        hidden, cache = inference.decode(model, cache, token, active.astype(jnp.int32), implementation)
        active &= ~ended & (step + 1 < steps)
        return step + 1, active, hidden, cache, tokens, all_logits, finite

    start = (
        jnp.int32(0),
        steps > 0,
        hidden,
        cache,
        jnp.full((rows, size), -1, jnp.int32),
        jnp.zeros((rows, size, model.config.vocab_size), jnp.float32),
        jnp.ones(rows, bool),
    )
    *_, tokens, logits, finite = lax.while_loop(lambda state: jnp.any(state[1]), body, start)
    return _Decoded(tokens, logits, finite)


@jax.jit
def _fidelity(
    full: Float[Array, "B M V"], other: Float[Array, "B M V"], truth: Int[Array, "B M"], known: Int[Array, "B"]
) -> tuple[Array, Array, Array, Array, Array]:
    """Each row's means over its `known` tokens (NLL, the full cache's, KL, agreement); whether all are the argmax."""
    full, other = jax.nn.log_softmax(full), jax.nn.log_softmax(other)
    valid = jnp.arange(truth.shape[1]) < known[:, None]

    def mean(x: Array) -> Array:
        return jnp.sum(jnp.where(valid, x, 0.0), axis=1) / jnp.maximum(known, 1)

    def nll(x: Array) -> Array:
        return -jnp.take_along_axis(x, truth[..., None], axis=-1)[..., 0]

    kl = jnp.sum(jnp.exp(full) * (full - other), axis=-1)
    agreement = full.argmax(-1) == other.argmax(-1)
    exact = jnp.all((other.argmax(-1) == truth) | ~valid, axis=1)
    return mean(nll(other)), mean(nll(full)), mean(kl), mean(agreement), exact
