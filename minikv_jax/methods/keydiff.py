"""KeyDiff (arXiv 2504.15364): keeps keys that differ most from their mean."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.methods.base import LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer


@register_scorer("keydiff")
class KeyDiff(Scorer):
    """Keeps keys that differ most from the mean direction (KeyDiff section 3, arXiv 2504.15364).

    The score is minus the cosine between a key and the mean of the row's unit keys.
    """

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        keys = inputs.k.astype(jnp.float32)
        valid = jnp.arange(keys.shape[1]) < inputs.lengths[:, None]
        unit = jnp.where(valid[..., None, None], _unit(keys), 0.0)
        anchor = _unit(jnp.sum(unit, axis=1))  # the mean's direction, [B, K, H]
        return -jnp.einsum("btkh,bkh->bkt", unit, anchor, precision="highest")


def _unit(x: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1.0, norm)


register_method(
    Method(
        name="keydiff",
        citation="KeyDiff, arXiv 2504.15364: the 20 % of keys least like their mean",
        scorer=KeyDiff(),
        heavy=0.2,
        recent=0.0,
    )
)
