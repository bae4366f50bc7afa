"""KNorm (Devoto et al., arXiv 2406.11430; https://github.com/alessiodevoto/l2compress): keeps keys of small norm."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.methods.base import LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer


@register_scorer("knorm")
class KNorm(Scorer):
    """Keeps keys with the smallest L2 norm (Devoto et al. section 3, arXiv 2406.11430)."""

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        return -jnp.linalg.norm(inputs.k.astype(jnp.float32), axis=-1).swapaxes(1, 2)


register_method(
    Method(
        name="knorm",
        citation="Devoto et al., arXiv 2406.11430: the 50 % of keys with the smallest norm",
        scorer=KNorm(),
        heavy=0.5,
        recent=0.0,
    )
)
