"""Measures methods on a prompt with one shared prefill, which every method compresses.

Sharing the prefill is exact, because attention over the prompt is full and does not depend on the method; one with
`lookahead` runs the prompt once more, with its draft, and one that repeats it at twice the length. The queries, keys
and values of all layers stay in memory. Per method, the true continuation is then fed token by token through the
compressed cache ("teacher forcing"), as generation would do it, and the logits are compared with those of the full
cache; or text is generated greedily. The model runs layer by layer (`layerwise.py`), which compiles little.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import meshes
from minikv_jax.cache import memory
from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.evaluation.decoding import Batch, Decoded, batch_of, decode_batch
from minikv_jax.evaluation.task import Case
from minikv_jax.layerwise import (
    Compressed,
    PromptLayer,
    compress_layers,
    extend_layers,
    look_ahead,
    prefill_layers,
    shared_capacities,
)
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.prompts import check_second_run


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
      cases: cases of one padded length (`padded_length`); if they have questions, of one prompt.
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
    rows: int | None = None,
) -> Iterator[tuple[str, list[Measurement]]]:
    """Measures as `measure` does, yielding each method's name and its measurements when they are done.

    `rows` is the number of questions about one prompt that are answered at a time, all by default.
    """
    for case in cases:
        check_case(model.config, case, new_tokens)
    for method in methods.values():
        contracts.check(method, model.config)
        for case in cases:
            check_second_run(model, len(case.prompt), method)
    prompt, batches = _prompt(model, cases, methods.values(), new_tokens, implementation, rows)
    full = lookup.get("full")
    sizes = {"prompt_length": prompt.ids.shape[1], "max_new_tokens": new_tokens}
    bytes_of = functools.partial(memory.report, model.config, **sizes, dtype=model.dtype.name)
    full_bytes = bytes_of(full).bytes

    def run(method: Method, *, answer: bool) -> list[_Run]:
        capacities = shared_capacities(model.config, method, **sizes)
        with meshes.use(model.mesh):
            cache, _, scored = prompt.compress(model, method, capacities, implementation)
            size = bytes_of(method).bytes
            return [
                _run(model, prompt.shared_by(batch, cache, scored), batch, size, answer, implementation)
                for batch in batches
            ]

    # One method at a time, because logits are large and only those of the full cache are needed again.
    is_asked, is_known = full in methods.values(), any(case.continuation for case in cases)
    reference = run(full, answer=is_asked) if is_asked or is_known else None
    forced = [None] * len(batches) if reference is None else [result.forced for result in reference]
    names: dict[Method, list[str]] = {}
    for name, method in methods.items():
        names.setdefault(method, []).append(name)
    for method, same_method in names.items():
        results = reference if reference is not None and method == full else run(method, answer=True)
        measurements = [
            measurement
            for result, expected, batch in zip(results, forced, batches, strict=True)
            for measurement in _measurements(result, expected, batch, full_bytes)
        ]
        for name in same_method:
            yield name, measurements


class _Start(NamedTuple):
    """What a batch starts from: the compressed prompts, and the hidden states that its first tokens come from."""

    cache: KVCache
    hidden: Float[Array, "B D"]
    scored: Bool[Array, "B"]


class _Prompt(NamedTuple):
    """A prefilled batch of prompts, or one prompt that all cases share."""

    ids: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B]
    hidden: Float[Array, "B D"]
    layers: list[PromptLayer]
    is_shared: bool

    def compress(
        self, model: Llama, method: Method, capacities: Sequence[LayerCapacity], implementation: str | None
    ) -> Compressed:
        """Compresses the prompts with a method."""
        prompt = self.ids, self.lengths
        layers, seen = look_ahead(model, method, prompt, self.hidden, self.layers, implementation)
        return compress_layers(model.config, method, layers, self.lengths, seen, capacities, implementation)

    def shared_by(self, batch: Batch, cache: KVCache, scored: Array) -> _Start:
        """The start of a batch; each of its rows gets a copy of a shared prompt."""
        if not self.is_shared:
            return _Start(cache, self.hidden, scored)
        rows = len(batch.lengths)
        return _Start(cache.tile(rows), jnp.repeat(self.hidden, rows, axis=0), jnp.repeat(scored, rows))


def _prompt(
    model: Llama,
    cases: Sequence[Case],
    methods: Iterable[Method],
    new_tokens: int,
    implementation: str | None,
    rows: int | None,
) -> tuple[_Prompt, list[Batch]]:
    """Prefills the prompts, or the one that all cases ask about, and makes the batches of cases."""
    is_shared = any(case.question for case in cases)
    if is_shared and (len({case.prompt for case in cases}) > 1 or not all(case.question for case in cases)):
        raise ValueError("cases with questions: expected a question of each case, all about one prompt")
    size = rows if is_shared and rows is not None else len(cases)
    batches = [batch_of(model.config, cases[i : i + size], new_tokens) for i in range(0, len(cases), size)]
    ids, lengths = (x[:1] if is_shared else x for x in (batches[0].ids, batches[0].lengths))
    sums = any(method.scorer.needs_column_sums for method in methods)
    with meshes.use(model.mesh):
        hidden, layers = prefill_layers(model, ids, lengths, sums, implementation)
    return _Prompt(ids, lengths, hidden, layers, is_shared), batches


def _run(model: Llama, start: _Start, batch: Batch, cache_bytes: int, answer: bool, implementation: str | None) -> _Run:
    """Asks the questions, if any, then feeds the true tokens and generates."""
    cache, hidden, scored = start
    if batch.questions.size:
        hidden, cache = extend_layers(model, cache, batch.questions, batch.asked, implementation)
    decode = functools.partial(decode_batch, model, cache, hidden, batch, implementation=implementation)
    forced = decode(batch.known) if batch.known.any() else None
    answered = decode(np.zeros_like(batch.known)) if answer and batch.to_generate.any() else None
    return _Run(cache_bytes, scored, forced, answered)


class _Run(NamedTuple):
    cache_bytes: int
    scored: Bool[Array, "B"]  # whether no score was NaN
    forced: Decoded | None
    answered: Decoded | None


def _measurements(run: _Run, reference: Decoded | None, batch: Batch, full_bytes: int) -> list[Measurement]:
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
