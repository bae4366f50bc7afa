"""TOVA (arXiv 2401.06104; https://github.com/schwartz-lab-NLP/TOVA): scores by the attention of the last query."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.methods.base import LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer


@register_scorer("tova")
class TOVA(Scorer):
    """Attention weights of the last query, averaged over all heads (TOVA section 3.2, arXiv 2401.06104).

    Every KV head keeps the same tokens. With `evict_every`, each new query replaces the scores.
    """

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (1,)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        (votes,) = inputs.votes
        heads = inputs.q.shape[2]
        return jnp.broadcast_to(jnp.sum(votes, axis=1, keepdims=True) / heads, votes.shape)

    def update(self, scores: Float[Array, "B K C"], weights: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        """Returns the newest query's weights, the same for all KV heads."""
        del scores
        return jnp.broadcast_to(jnp.mean(weights, axis=1, keepdims=True), weights.shape)


register_method(
    Method(
        name="tova",
        citation="TOVA, arXiv 2401.06104: 20 % by the last query's weights, the same tokens for every head",
        scorer=TOVA(),
        heavy=0.2,
        recent=0.0,
    )
)
