"""Sampling: draws the next token from the logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import fields
from minikv_jax.fields import setting

_LEAST = float(jnp.finfo(jnp.float32).tiny)  # smallest temperature that float32 can divide by


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. The filters apply in this order: top-k, top-p, min-p.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: keeps the `top_k` most likely tokens; None keeps all.
      top_p: keeps the smallest set of most likely tokens whose probability reaches `top_p` (nucleus sampling, arXiv
        1904.09751); None keeps all.
      min_p: drops tokens less likely than `min_p` times the most likely one (arXiv 2407.01082); None drops none.

    Raises:
      ValueError: a value out of range, or a filter with temperature 0.
    """

    temperature: float = setting(default=0.0, at_least=0)
    top_k: int | None = setting(default=None, kind=int, at_least=1, at_most=2**31 - 1)
    top_p: float | None = setting(default=None, kind=float, above=0, at_most=1)
    min_p: float | None = setting(default=None, kind=float, above=0, at_most=1)

    def __post_init__(self) -> None:
        fields.check(self)
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            raise ValueError("top_k, top_p and min_p need temperature > 0: temperature 0 is greedy")


def sample(logits: Float[Array, "B V"], sampling: Sampling, key: Array) -> Int[Array, "B"]:
    """Draws one token id per row. At temperature 0, ties go to the lower id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Divides differences to the best logit: a small temperature gives 0 and -inf, but inf and NaN for plain logits.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(sampling.temperature, _LEAST)
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus(logits: Array, top_p: float) -> Array:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
