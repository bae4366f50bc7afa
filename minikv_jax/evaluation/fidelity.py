"""Fidelity of a method, without a benchmark's metric: what the model says of a known continuation.

A prompt is prefilled and compressed, then the true continuation is fed token by token through the compressed cache
("teacher forcing"), exactly as generation would, and the logits are compared with the continuation and with those of
the full cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import inference, memory, presets
from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig
from minikv_jax.generate import bucket_length, last_valid
from minikv_jax.model import Llama


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Means over a window's continuation of one method.

    Attributes:
      nll, full_nll: negative log-likelihood of the true continuation under the method and under the full cache, nats
        per token.
      kl_to_full: KL divergence from the full cache's next-token distribution to the method's, nats per token.
      top1_agreement: share of positions where both have the same most likely token.
      cache_bytes, full_cache_bytes: allocated, for the same prompt and continuation.
    """

    nll: float
    full_nll: float
    kl_to_full: float
    top1_agreement: float
    cache_bytes: int
    full_cache_bytes: int


def book_windows(ids: Sequence[int], prompt: int, continuation: int, count: int) -> list[tuple[list[int], list[int]]]:
    """`count` windows of a text, evenly spaced and not overlapping: (prompt ids, continuation ids).

    Raises:
      ValueError: sizes below 1, or a text too short for them.
    """
    for name, value in (("prompt", prompt), ("continuation", continuation), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    size = prompt + continuation
    if len(ids) < size * count:
        raise ValueError(f"the text has {len(ids)} tokens: {count} windows of {size} need {size * count}")
    starts = [index * (len(ids) // count) for index in range(count)]
    return [(list(ids[s : s + prompt]), list(ids[s + prompt : s + size])) for s in starts]


def compare(
    model: Llama,
    prompt: Sequence[int],
    continuation: Sequence[int],
    methods: Mapping[str, CacheConfig],
    implementation: str | None = None,
) -> dict[str, Fidelity]:
    """The fidelity of each method on one prompt and its true continuation.

    Raises:
      ValueError: an empty prompt or continuation, more tokens than the model has positions, or a method that does not
        fit the model.
    """
    if not prompt or not continuation:
        raise ValueError(f"{len(prompt)} prompt and {len(continuation)} continuation tokens: expected at least 1 each")
    most = model.config.max_position_embeddings
    if len(prompt) + len(continuation) > most:
        raise ValueError(f"{len(prompt)} + {len(continuation)} tokens exceed the model's {most} positions")
    for config in methods.values():
        memory.check_model(model.config, config)
    graphdef, params = nnx.split(model)
    ids = np.zeros((1, bucket_length(len(prompt), most)), np.int32)
    ids[0, : len(prompt)] = prompt
    length, truth = np.array([len(prompt)], np.int32), np.asarray([continuation], np.int32)

    @functools.cache
    def run(config: CacheConfig) -> tuple[Array, int]:
        logits, cache = teacher_forced(graphdef, params, ids, length, truth, config, implementation)
        return jax.nn.log_softmax(logits[0]), cache.nbytes

    full, full_bytes = run(presets.get("full"))
    results = {}
    for name, config in methods.items():
        other, cache_bytes = run(config)
        results[name] = Fidelity(
            nll=_nll(other, truth[0]),
            full_nll=_nll(full, truth[0]),
            kl_to_full=float(jnp.mean(jnp.sum(jnp.exp(full) * (full - other), axis=-1))),
            top1_agreement=float(jnp.mean(full.argmax(-1) == other.argmax(-1))),
            cache_bytes=cache_bytes,
            full_cache_bytes=full_bytes,
        )
    return results


def _nll(log_probabilities: Array, tokens: np.ndarray) -> float:
    return -float(jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, None], axis=-1)))


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def teacher_forced(
    graphdef: nnx.GraphDef,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    continuation: Int[Array, "B M"],
    config: CacheConfig,
    implementation: str | None,
) -> tuple[Float[Array, "B M V"], KVCache]:
    """Logits, float32 `[B, M, V]`, of each continuation token given the compressed prompt and the ones before it."""
    model = nnx.merge(graphdef, params)
    hidden, cache = inference.prefill(model, ids, lengths, config, continuation.shape[1], implementation)

    def step(state: tuple[Array, KVCache], token: Array) -> tuple[tuple[Array, KVCache], Array]:
        hidden, cache = state
        logits = model.logits(hidden)
        return inference.decode(model, cache, token, jnp.ones_like(lengths), implementation), logits

    start = (last_valid(hidden, lengths), cache)
    (_, cache), logits = lax.scan(step, start, continuation.T)
    return logits.swapaxes(0, 1), cache
