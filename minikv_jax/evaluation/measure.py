"""Measures methods on a prompt with one shared prefill, which every method compresses.

Sharing the prefill is exact, because attention over the prompt is full and does not depend on the method. The queries,
keys and values of all layers stay in memory. Per method, the true continuation is then fed token by token through the
compressed cache ("teacher forcing"), as generation would do it, and the logits are compared with those of the full
cache; or text is generated greedily. The model runs layer by layer (`layerwise.py`), which compiles little.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import meshes
from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache
from minikv_jax.evaluation.task import Case
from minikv_jax.layerwise import compress_layers, decode_step, look_ahead, prefill_layers, shared_capacities
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.prompts import bucket_length, check_positions


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Result of one method on one case.

    Attributes:
      finite: whether all logits were finite and no score of the prompt was NaN. If not, the next five are None. They
        are also None for a case without a continuation.
      nll, full_nll: negative log-likelihood of the true continuation under the method and under the full cache, in nats
        per token.
      kl_to_full: KL divergence from the full cache's next-token distribution to the method's, in nats per token.
      top1_agreement: fraction of positions where both have the same most likely token.
      exact_match: whether greedy generation of as many tokens gives the continuation.
      generated: token ids of the greedy answer, without the token that ended it; None if no text was requested.
      cache_bytes, full_cache_bytes: bytes allocated for the padded prompt and the new tokens.
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
    """Returns the length that a case's prompt is padded to, in tokens."""
    return bucket_length(len(case.prompt), model.max_position_embeddings)


def check_case(model: ModelConfig, case: Case, new_tokens: int) -> None:
    """Raises ValueError if a case is empty, too long for the model, or has ids outside the vocabulary."""
    if not case.prompt or not case.new_tokens:
        raise ValueError(
            f"{case.name}: {len(case.prompt)} prompt and {case.new_tokens} new tokens: expected at least 1 each"
        )
    positions = model.max_position_embeddings
    if len(case.prompt) + new_tokens > positions:
        raise ValueError(
            f"{case.name}: {len(case.prompt)} prompt + {new_tokens} new tokens exceed the model's {positions} positions"
        )
    for token in (*case.prompt, *case.continuation):
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"{case.name}: token id {token} is outside the vocabulary of {model.vocab_size}")


def measure(
    model: Llama,
    cases: Sequence[Case],
    methods: Mapping[str, Method],
    new_tokens: int,
    implementation: str | None = None,
) -> list[dict[str, Measurement]]:
    """Measures every method on a batch of cases.

    Args:
      model: the model.
      cases: cases of one padded length (`padded_length`).
      methods: the methods by name.
      new_tokens: room in the caches in tokens, at least every case's `new_tokens`.
      implementation: of the attention ops: "xla", "pallas", "cuda", or None for the fastest.

    Returns:
      For each case, a measurement per method.

    Raises:
      ValueError: a case or a method does not fit the model.
    """
    results: list[dict[str, Measurement]] = [{} for _ in cases]
    for name, measurements in measure_each(model, cases, methods, new_tokens, implementation):
        for row, measurement in zip(results, measurements, strict=True):
            row[name] = measurement
    return results


def measure_each(
    model: Llama,
    cases: Sequence[Case],
    methods: Mapping[str, Method],
    new_tokens: int,
    implementation: str | None = None,
) -> Iterator[tuple[str, list[Measurement]]]:
    """Measures as `measure` does, yielding each method's name and its measurements when they are done."""
    for case in cases:
        check_case(model.config, case, new_tokens)
    for method in methods.values():
        contracts.check(method, model.config)
        for case in cases:
            check_positions(model, len(case.prompt), method.lookahead)
    batch = _batch(model.config, cases, new_tokens)
    sums = any(method.scorer.needs_column_sums for method in methods.values())
    with meshes.use(model.mesh):
        hidden, layers = prefill_layers(model, batch.ids, batch.lengths, sums, implementation)
    full = lookup.get("full")
    sizes = {"prompt_length": batch.ids.shape[1], "max_new_tokens": new_tokens}
    bytes_of = functools.partial(memory.report, model.config, **sizes, dtype=model.dtype.name)
    full_bytes = bytes_of(full).bytes

    def run(method: Method, *, answer: bool) -> _Run:
        capacities = shared_capacities(model.config, method, **sizes)
        with meshes.use(model.mesh):
            prompt = batch.ids, batch.lengths
            inputs, seen = look_ahead(model, method, prompt, hidden, layers, implementation)
            cache, _, scored = compress_layers(
                model.config, method, inputs, batch.lengths, seen, capacities, implementation
            )
            decode = functools.partial(_decode, model, cache, hidden, batch, implementation=implementation)
            forced = decode(batch.known) if batch.known.any() else None
            answered = decode(np.zeros_like(batch.known)) if answer and batch.to_generate.any() else None
        return _Run(bytes_of(method).bytes, scored, forced, answered)

    # One method at a time, because logits are large and only those of the full cache are needed again.
    reference = run(full, answer=full in methods.values())
    names: dict[Method, list[str]] = {}
    for name, method in methods.items():
        names.setdefault(method, []).append(name)
    for method, same_method in names.items():
        result = reference if method == full else run(method, answer=True)
        measurements = _measurements(result, reference.forced, batch, full_bytes)
        for name in same_method:
            yield name, measurements


class _Batch(NamedTuple):
    """A batch of cases as arrays."""

    ids: np.ndarray  # int32 [B, T], padded
    lengths: np.ndarray  # int32 [B]
    truth: np.ndarray  # int32 [B, R], R the room of the caches
    known: np.ndarray  # int32 [B], tokens of the continuation
    to_generate: np.ndarray  # int32 [B], maximum number of tokens
    stop: np.ndarray  # int32 [B, E], padded with -1


class _Decoded(NamedTuple):
    tokens: Int[Array, "B M"]  # -1 beyond a row's end
    logits: Float[Array, "B M V"] | None  # None if tokens were generated
    finite: Bool[Array, "B"]


class _Run(NamedTuple):
    cache_bytes: int
    scored: Bool[Array, "B"]  # whether no score was NaN
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


def _measurements(run: _Run, reference: _Decoded | None, batch: _Batch, full_bytes: int) -> list[Measurement]:
    """Makes each row's measurement."""
    rows = len(batch.lengths)
    finite = np.asarray(run.scored)
    values: list[np.ndarray] = []
    if run.forced is not None and reference is not None:
        assert run.forced.logits is not None and reference.logits is not None
        finite = finite & np.asarray(run.forced.finite)
        values = [np.asarray(x) for x in _fidelity(reference.logits, run.forced.logits, batch.truth, batch.known)]
    answers: list[tuple[int, ...] | None] = [None] * rows
    if run.answered is not None:
        tokens = np.asarray(run.answered.tokens)
        finite = finite & (np.asarray(run.answered.finite) | (batch.to_generate == 0))
        answers = [
            tuple(t for t in tokens[row].tolist() if t >= 0 and t not in batch.stop[row]) if asked else None
            for row, asked in enumerate(batch.to_generate)
        ]
    measurements = []
    for row in range(rows):
        known = values if batch.known[row] and finite[row] else ()
        nll, full_nll, kl, agreement, exact = (x[row].item() for x in known) if known else (None,) * 5
        measurements.append(
            Measurement(
                finite=bool(finite[row]),
                nll=nll,
                full_nll=full_nll,
                kl_to_full=kl,
                top1_agreement=agreement,
                exact_match=exact,
                generated=answers[row],
                cache_bytes=run.cache_bytes,
                full_cache_bytes=full_bytes,
            )
        )
    return measurements


def _decode(
    model: Llama,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    batch: _Batch,
    forced: np.ndarray,
    implementation: str | None,
) -> _Decoded:
    """Feeds each row's first `forced[b]` true tokens, or generates up to `to_generate[b]` greedily if all are 0."""
    forcing = bool(forced.any())
    steps = forced if forcing else batch.to_generate
    cache = jax.tree.map(jnp.copy, cache)  # the steps update in place, and the caller needs its cache again
    active, finite = jnp.asarray(steps > 0), jnp.ones(len(steps), bool)
    tokens, all_logits = [], []
    for step in range(last := int(steps.max())):
        logits = model.logits(hidden)
        truth = batch.truth[:, step] if forcing else None
        token, going, finite = _next_token(logits, truth, active, finite, steps > step + 1, batch.stop)
        tokens.append(jnp.where(active, token, -1))
        if forcing:
            all_logits.append(logits)
        if step + 1 == last or not (forcing or going.any()):
            break
        hidden, cache = decode_step(model, cache, token, active.astype(jnp.int32), implementation)
        active = going
    return _Decoded(jnp.stack(tokens, axis=1), jnp.stack(all_logits, axis=1) if forcing else None, finite)


@jax.jit
def _next_token(
    logits: Float[Array, "B V"],
    truth: Int[Array, "B"] | None,
    active: Bool[Array, "B"],
    finite: Bool[Array, "B"],
    more: Bool[Array, "B"],
    stop: Int[Array, "B E"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"], Bool[Array, "B"]]:
    """Returns the true or the likeliest token, whether each row continues after it, and whether logits were finite."""
    finite &= jnp.all(jnp.isfinite(logits), axis=-1) | ~active
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32) if truth is None else truth
    token = jnp.where(active, token, 0)
    going = active & more
    if truth is None:
        going &= ~jnp.any(token[:, None] == stop, axis=1)
    return token, going, finite


@jax.jit
def _fidelity(
    full: Float[Array, "B M V"], other: Float[Array, "B M V"], truth: Int[Array, "B R"], known: Int[Array, "B"]
) -> tuple[Array, Array, Array, Array, Array]:
    """Averages NLL, full NLL, KL and agreement over each row's `known` tokens; tells whether all are the argmax."""
    truth = truth[:, : full.shape[1]]  # no row has more known tokens
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
