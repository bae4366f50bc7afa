"""Adds a budget rule: more tokens for the first and last layers than for those between.

Try it: minikv evaluate perplexity --plugin examples/plugin_budget.py --method hourglass --model M --text T
"""

import dataclasses

import minikv_jax


@minikv_jax.register_budget("hourglass")
class Hourglass(minikv_jax.Budget):
    """Budget rule with weight 1 at both ends and `waist` in the middle; `--set waist=0.2` changes it."""

    waist: float = 0.5

    def weights(self, num_layers: int):
        """Returns one weight per layer. Only their ratios count, because the total stays `heavy`."""
        middle = max((num_layers - 1) / 2, 1)
        return [self.waist + (1 - self.waist) * abs(layer / middle - 1) for layer in range(num_layers)]


minikv_jax.register_method(
    dataclasses.replace(minikv_jax.lookup.get("minikv"), name="hourglass", budget=Hourglass(), citation="an example")
)
