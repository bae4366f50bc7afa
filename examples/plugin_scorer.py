"""Adds a scorer: attention paid to a token times the norm of its value (VATP, arXiv 2406.12335).

Try it: minikv evaluate perplexity --plugin examples/plugin_scorer.py --method vatp --method minikv --model M --text T
"""

from typing import ClassVar

import jax.numpy as jnp

import minikv_jax


@minikv_jax.register_scorer("attention-times-value")
class AttentionTimesValue(minikv_jax.Scorer):
    """Scorer by attention times the norm of the value. Fields are settings: `--set norm=2` changes this one."""

    needs_column_sums: ClassVar[bool] = True

    norm: int = 1

    def score(self, inputs: minikv_jax.LayerInputs):
        """Returns scores [B, K, T]; tokens with higher scores are kept first."""
        values = inputs.v.astype(jnp.float32)  # [B, T, K, H]
        size = jnp.linalg.norm(values, ord=self.norm, axis=-1)
        return inputs.column_sums * size.swapaxes(1, 2)


minikv_jax.register_method(
    minikv_jax.Method(
        name="vatp",
        scorer=AttentionTimesValue(),
        heavy=0.25,
        recent=0.25,
        sinks=4,
        quantizer=minikv_jax.MinMax(k_bits=4, v_bits=4, group_size=32),
    )
)
