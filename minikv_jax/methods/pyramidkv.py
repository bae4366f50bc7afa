"""PyramidKV (arXiv 2406.02069; https://github.com/Zefan-Cai/KVCache-Factory): budgets that fall over the layers."""

from __future__ import annotations

from minikv_jax.fields import setting
from minikv_jax.methods.base import Budget
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_budget, register_method
from minikv_jax.methods.snapkv import SnapKV


@register_budget("pyramid")
class Pyramid(Budget):
    """Lets the budget fall linearly from the first layer to the last (PyramidKV section 3.2; MiniKV section 3.1).

    Attributes:
      beta: the last layer gets `1 / beta` of the mean budget. 20 in PyramidKV (arXiv 2406.02069), 7 in MiniKV.
    """

    beta: float = setting(default=7.0, at_least=1, at_most=1e6)

    def weights(self, num_layers: int) -> list[float]:
        last = 1 / self.beta
        first = 2 - last
        return [first + (last - first) * layer / max(num_layers - 1, 1) for layer in range(num_layers)]


register_method(
    Method(
        name="pyramidkv",
        citation="PyramidKV, arXiv 2406.02069: the votes of the last 8 queries, budgets falling linearly, beta 20",
        scorer=SnapKV(observation_window=8),
        budget=Pyramid(beta=20.0),
        heavy=1016,
        recent=8,
    )
)
