"""Log-likelihoods of many continuations of one context, from one compressed cache of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.decode import extend
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import Llama
from minikv_jax.prefill import prefill
from minikv_jax.prompts import bucket_length, pad_prompts

_POSITIONS = 32  # whose logits are in memory at a time


class Likelihood(NamedTuple):
    """Score of a continuation.

    Attributes:
      total: sum of its tokens' log-probabilities (natural logarithm).
      greedy: whether every token is the likeliest.
      finite: whether all logits were finite.
    """

    total: float
    greedy: bool
    finite: bool


class Context(NamedTuple):
    """A context, and its continuations by the caller's numbers for them.

    Attributes:
      tokens: token ids, at least one.
      continuations: token ids of each, at least one.
    """

    tokens: tuple[int, ...]
    continuations: Mapping[int, Sequence[int]]

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that are compressed: all but the last one, which is read from the cache, if there are others."""
        return self.tokens[:-1] or self.tokens

    def fed(self, number: int) -> list[int]:
        """The tokens that follow the prefix, to predict a continuation."""
        return [*self.tokens[len(self.prefix) :], *self.continuations[number][:-1]]

    def targets(self, number: int) -> list[int]:
        """The tokens to predict after the prefix and after each token of `fed`; -1 where there is none."""
        return [-1] * (len(self.tokens) - len(self.prefix)) + list(self.continuations[number])


def likelihoods(
    model: Llama, method: Method, contexts: Sequence[Context], batch: int, implementation: str | None = None
) -> Iterator[tuple[int, Likelihood]]:
    """Scores all continuations of some contexts, which are compressed once each.

    The last token of a context runs through the compressed cache before the continuation, so that every scored token
    depends on what the method kept. Only a context of a single token is its own prefix.

    Args:
      model: the model, on one device.
      method: compresses the prefixes.
      contexts: a batch; all prefixes are padded to the longest one.
      batch: continuations at a time.
      implementation: "xla", "pallas" or "cuda", for all ops; None for the fastest recorded one.

    Yields:
      The number of a continuation and its score.
    """
    graphdef, params = nnx.split(model)
    ids, lengths = pad_prompts(
        [context.prefix for context in contexts], model.config.vocab_size, model.config.max_position_embeddings
    )
    work = [(row, number) for row, context in enumerate(contexts) for number in context.continuations]
    work.sort(key=lambda item: len(contexts[item[0]].fed(item[1])), reverse=True)
    room = bucket_length(max(1, len(contexts[work[0][0]].fed(work[0][1]))))
    hidden, cache = _compress(graphdef, method, implementation, room, params, ids, lengths)
    for start in range(0, len(work), batch):
        some = work[start : start + batch]
        # The last one fills the batch up, because a smaller batch would need another compilation.
        filled = [*some, *itertools.repeat(some[-1], min(batch, len(work)) - len(some))]
        inputs = _inputs(contexts, filled)
        scored = map(np.asarray, _score(graphdef, implementation, params, hidden, cache, *inputs))
        for (_, number), each, greedy, finite in zip(some, *scored, strict=False):
            yield number, Likelihood(float(each.sum(dtype=np.float64)), bool(greedy), bool(finite))


class _Inputs(NamedTuple):
    """Continuations as arrays."""

    rows: np.ndarray  # int32 [B], the contexts
    ids: np.ndarray  # int32 [B, T], padded
    lengths: np.ndarray  # int32 [B]
    targets: np.ndarray  # int32 [B, T + 1], -1 where nothing is to predict


def _inputs(contexts: Sequence[Context], work: Sequence[tuple[int, int]]) -> _Inputs:
    fed = [contexts[row].fed(number) for row, number in work]
    targets = [contexts[row].targets(number) for row, number in work]
    ids = np.zeros((len(work), bucket_length(max(1, *map(len, fed)))), np.int32)
    wanted = np.full((len(work), ids.shape[1] + 1), -1, np.int32)
    for index in range(len(work)):
        ids[index, : len(fed[index])] = fed[index]
        wanted[index, : len(targets[index])] = targets[index]
    rows, lengths = (np.array(values, np.int32) for values in ([row for row, _ in work], list(map(len, fed))))
    return _Inputs(rows, ids, lengths, wanted)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compress(
    graphdef, method: Method, implementation: str | None, room: int, params, ids, lengths
) -> tuple[Float[Array, "B D"], KVCache]:
    return prefill(nnx.merge(graphdef, params), ids, lengths, method, room, implementation)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    graphdef, implementation: str | None, params, hidden, cache: KVCache, rows, ids, lengths, targets
) -> tuple[Float[Array, "B M"], Bool[Array, "B"], Bool[Array, "B"]]:
    """Returns the targets' log-probabilities, whether all are the likeliest tokens, and whether logits are finite."""
    model: Llama = nnx.merge(graphdef, params)
    after, _ = extend(model, cache.select_rows(rows), ids, lengths, implementation)
    states = jnp.concatenate([hidden[rows][:, None], after], axis=1)

    def at(column: tuple[Float[Array, "B D"], Int[Array, "B"]]) -> tuple[Array, Array, Array]:
        state, target = column
        logits = model.logits(state)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
        wanted = target >= 0
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | ~wanted
        return jnp.where(wanted, chosen, 0), (logits.argmax(-1) == target) | ~wanted, finite

    chosen, greedy, finite = lax.map(at, (states.swapaxes(0, 1), targets.T), batch_size=_POSITIONS)
    return chosen.T, greedy.all(axis=0), finite.all(axis=0)
