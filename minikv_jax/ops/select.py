"""Select: chooses the prompt tokens that a layer keeps, given their scores (MiniKV section 3.1).

The choice is made once per prompt, for each layer, row and KV head. A layer keeps the first `sinks` tokens, the newest
`recent` tokens and the `heavy` top-scored tokens between them. Ties go to the earlier token, and kept tokens stay in
order of position.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.methods import calls
from minikv_jax.methods.method import Method, Share
from minikv_jax.models import windows
from minikv_jax.models.windows import Window


class Kept(NamedTuple):
    """Kept tokens: `positions[b, k, :tokens[b]]` ascending, then `T` (one past the end) as filler."""

    positions: Int[Array, "B K M"]
    tokens: Int[Array, "B"]


def select(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    method: Method,
    capacity: int,
    window: Window | None = None,
    second: Float[Array, "B K T"] | None = None,
) -> Kept:
    """Selects the tokens that a layer keeps. If it keeps all, nothing is sorted.

    Args:
      scores: tokens with higher scores are kept first; ties go to the lower position.
      lengths: valid tokens per row.
      heavy: number of top-scored tokens per row.
      method: sets the sinks and the recent budget.
      capacity: `M`, at least the tokens that any row keeps (`cache.capacity.kept_capacity`).
      window: sliding window or chunk of the layer. Tokens that new ones cannot see are not kept.
      second: scores of the second stage (`Scorer.rescore`). `scores` then chooses only the scorer's `first_share`.
    """
    tokens = scores.shape[-1]
    positions = jnp.arange(tokens)
    if method.keeps_all and window is None:
        slots = positions[:capacity]  # fewer than the tokens if drafted or repeated ones follow the prompt
        kept = jnp.where(slots < lengths[:, None, None], slots, tokens)
        return Kept(jnp.broadcast_to(kept, (*scores.shape[:2], slots.size)), lengths)
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(windows.oldest(window, lengths), 0)
    visible = lengths - first
    sinks = jnp.minimum(method.sinks, visible) if window is None else jnp.clip(method.sinks - first, 0, visible)
    recent = jnp.minimum(method.recent.tokens(lengths), visible - sinks)
    heavy = jnp.minimum(heavy, visible - sinks - recent)
    in_view = (positions >= first[:, None]) & (positions < lengths[:, None])  # [B, T]
    forced = in_view & ((positions < (first + sinks)[:, None]) | (positions >= (lengths - recent)[:, None]))
    if second is not None:
        first_count = sinks + recent + Share(calls.first_share(method.scorer)).tokens(heavy)
        _, order = lax.top_k(rank(scores, forced, in_view), capacity)
        chosen = jnp.arange(capacity) < first_count[:, None, None]
        chosen = jnp.put_along_axis(jnp.zeros(scores.shape, bool), order, chosen, axis=-1, inplace=False)
        scores = jnp.where(chosen, jnp.inf, second)
    _, order = lax.top_k(rank(scores, forced, in_view), capacity)  # equal elements come in order of position
    count = sinks + recent + heavy
    order = jnp.where(jnp.arange(capacity) < count[:, None, None], order, tokens)
    return Kept(jnp.sort(order, axis=-1), count)


def rank(scores: Float[Array, "B K C"], forced: Bool[Array, "B C"], valid: Bool[Array, "B C"]) -> Float[Array, "B K C"]:
    """Computes sorting keys: `forced` tokens first, then by score, tokens that are not `valid` last.

    Infinite scores stay between these, and NaN is the lowest score. Neither displaces a forced token.
    """
    largest = jnp.finfo(scores.dtype).max
    scores = jnp.nan_to_num(scores, nan=-largest, posinf=largest, neginf=-largest)
    return jnp.where(valid[:, None], jnp.where(forced[:, None], jnp.inf, scores), -jnp.inf)
