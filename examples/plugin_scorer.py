"""A scorer of your own: attention paid to a token times the size of its value (VATP, arXiv 2406.12335).

Try it: minikv evaluate perplexity --plugin examples/plugin_scorer.py --method vatp --method minikv --model M --text T
"""

import jax.numpy as jnp

import minikv_jax


@minikv_jax.register_scorer("attention-times-value", needs_column_sums=True, norm=1)
def attention_times_value(inputs: minikv_jax.ScorerInputs, config: minikv_jax.CacheConfig):
    """Scores [B, K, T], higher is kept first; `norm` is a setting of this scorer's own (`--set norm=2`)."""
    values = inputs.v.astype(jnp.float32)  # [B, T, K, H]
    size = jnp.linalg.norm(values, ord=config.option("norm"), axis=-1)
    return inputs.column_sums * size.swapaxes(1, 2)


minikv_jax.register_method(
    minikv_jax.CacheConfig(
        name="vatp", scorer="attention-times-value", heavy=0.25, recent=0.25, sinks=4, k_bits=4, v_bits=4, group_size=32
    )
)
