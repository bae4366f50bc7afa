"""Batches of cases as arrays, and the decoding of their answers over a compressed cache, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.evaluation.task import Case
from minikv_jax.layerwise import decode_step
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.prompts import bucket_length


def padded_length(model: ModelConfig, case: Case) -> int:
    """Returns the length that a case's prompt is padded to, in tokens."""
    return bucket_length(len(case.prompt), model.max_position_embeddings)


class Batch(NamedTuple):
    """A batch of cases as arrays."""

    ids: np.ndarray  # int32 [B, T], padded
    lengths: np.ndarray  # int32 [B]
    truth: np.ndarray  # int32 [B, R], R the room of the caches
    known: np.ndarray  # int32 [B], tokens of the continuation
    to_generate: np.ndarray  # int32 [B], maximum number of tokens
    stop: np.ndarray  # int32 [B, E], padded with -1
    questions: np.ndarray  # int32 [B, T], padded; no columns if there are none
    asked: np.ndarray  # int32 [B], tokens of the question


class Decoded(NamedTuple):
    """Tokens of a batch: true ones, with the logits of their places, or generated ones."""

    tokens: Int[Array, "B M"]  # -1 beyond a row's end
    logits: Float[Array, "B M V"] | None  # None if tokens were generated
    finite: Bool[Array, "B"]


def batch_of(model: ModelConfig, cases: Sequence[Case], new_tokens: int) -> Batch:
    """Makes the arrays of cases of one padded length, with room for `new_tokens` of each."""
    lengths = {padded_length(model, case) for case in cases}
    if len(lengths) != 1:
        raise ValueError(f"cases of padded lengths {sorted(lengths)}: expected one length per batch")
    stops = [(*model.eos_token_ids, *case.stop) for case in cases]
    asked = [len(case.question) for case in cases]
    return Batch(
        _padded([case.prompt for case in cases], lengths.pop(), 0),
        np.array([len(case.prompt) for case in cases], np.int32),
        _padded([case.continuation for case in cases], new_tokens, 0),
        np.array([len(case.continuation) for case in cases], np.int32),
        np.array([case.max_new_tokens for case in cases], np.int32),
        _padded(stops, max(8, *map(len, stops)), -1),
        _padded([case.question for case in cases], bucket_length(max(asked)) if any(asked) else 0, 0),
        np.array(asked, np.int32),
    )


def _padded(rows: Sequence[Sequence[int]], size: int, filler: int) -> np.ndarray:
    array = np.full((len(rows), size), filler, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def decode_batch(
    model: Llama,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    batch: Batch,
    forced: np.ndarray,
    implementation: str | None,
) -> Decoded:
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
    return Decoded(jnp.stack(tokens, axis=1), jnp.stack(all_logits, axis=1) if forcing else None, finite)


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
