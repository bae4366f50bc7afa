"""A budget rule of your own: more tokens for the first and the last layers than for those between.

Try it: minikv evaluate perplexity --plugin examples/plugin_budget.py --method hourglass --model M --text T
"""

import dataclasses

import minikv_jax


@minikv_jax.register_budget("hourglass", waist=0.5)
def hourglass(config: minikv_jax.CacheConfig, num_layers: int):
    """One weight per layer: 1 at both ends, `waist` in the middle. Only their ratios count: the total stays `heavy`."""
    middle = max((num_layers - 1) / 2, 1)
    waist = config.option("waist")
    return [waist + (1 - waist) * abs(layer / middle - 1) for layer in range(num_layers)]


minikv_jax.register_method(
    dataclasses.replace(minikv_jax.presets.get("minikv"), name="hourglass", budget="hourglass", citation="an example")
)
