"""MiniKV (arXiv 2411.18077; https://github.com/Supercomputing-System-AI-Lab/MiniKV): heavy hitters in 2 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import ScoredBudget
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.registry import register_budget, register_method
from minikv_jax.methods.snapkv import SnapKV


@register_budget("variance")
class Variance(ScoredBudget):
    """Gives layers with evenly spread scores a larger budget (MiniKV section 3.1, arXiv 2411.18077).

    The paper names the rule but gives no formula. Here a layer's weight is the mean over KV heads of
    `1 / (1 + Var[s / mean(s)])` over the row's valid tokens: the share of tokens that would carry the same second
    moment if they had equal scores. It is near 1 for flat scores and near `1 / tokens` for a spike.

    Attributes:
      cap: no layer gets more than this multiple of the mean budget.
    """

    def weights(self, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]) -> Float[Array, "L B"]:
        return jnp.stack([_spread(layer, lengths) for layer in scores])


def _spread(scores: Float[Array, "B K T"], lengths: Int[Array, "B"]) -> Float[Array, "B"]:
    valid = jnp.arange(scores.shape[-1]) < lengths[:, None, None]
    scores = jnp.where(valid, scores, 0.0)
    first, second = scores.sum(axis=-1), (scores**2).sum(axis=-1)
    return jnp.mean(first**2 / jnp.where(second == 0, 1.0, second) / lengths[:, None], axis=-1)


MINIKV = register_method(
    Method(
        name="minikv",
        citation="MiniKV, arXiv 2411.18077: 25 % heavy hitters + 25 % recent window, 2 bits in groups of 16",
        scorer=H2O(),
        heavy=0.25,
        recent=0.25,
        quantizer=MinMax(k_bits=2, v_bits=2, group_size=16),
    )
)
register_method(
    dataclasses.replace(
        MINIKV,
        name="minikv-pyramid",
        citation=MINIKV.citation + ", heavy budget falling linearly over layers",
        budget=Pyramid(beta=7.0),
    )
)
register_method(
    dataclasses.replace(
        MINIKV,
        name="minikv-variance",
        citation=MINIKV.citation + ", heavy budget by how spread out each layer's scores are",
        budget=Variance(),
    )
)
register_method(
    dataclasses.replace(
        MINIKV,
        name="minikv-snap",
        citation=MINIKV.citation + ", heavy hitters by SnapKV's observation window",
        scorer=SnapKV(),
    )
)
