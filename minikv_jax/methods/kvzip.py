"""KVzip (arXiv 2505.23416; https://github.com/snu-mllab/KVzip): scores by what a repetition of the prompt needs."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.methods.base import LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.votes import attention_weights, gather_votes


@register_scorer("kvzip")
class KVzip(Scorer):
    """Largest weight that a key gets from the queries of the prompt's repetition (KVzip section 3, arXiv 2505.23416).

    It needs no question: what a token is good for shows when the model writes the text again. The prompt runs a second
    time right after itself, whole and without an instruction to repeat it, and queries see its repeated tokens too.
    (The paper repeats one chunk at a time, after an instruction, and takes the weights over that chunk alone.)
    """

    needs_repeat: ClassVar[bool] = True

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        tokens, repeated = inputs.k.shape[1], inputs.lengths[:, None] // 2

        def weigh(back: Array, keys: Array, at: Array) -> Array:
            positions = jnp.where(back < repeated, inputs.lengths[:, None] - 1 - back, -1)
            return attention_weights(inputs, positions, keys, at)

        return gather_votes(inputs, -(-tokens // 2), weigh, lambda votes, new: jnp.maximum(votes, new.max((2, 3))))


register_method(
    Method(
        name="kvzip",
        citation="KVzip, arXiv 2505.23416: 30 % by what the prompt's repetition asks for, 4 sinks",
        scorer=KVzip(),
        heavy=0.3,
        recent=0.0,
        sinks=4,
    )
)
