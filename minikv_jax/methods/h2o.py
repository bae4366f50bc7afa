"""H2O (arXiv 2306.14048; https://github.com/FMInference/H2O): keeps heavy hitters, by accumulated attention."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Array, Float

from minikv_jax.methods.base import LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer


@register_scorer("h2o")
class H2O(Scorer):
    """Accumulated attention: column sums of the causal softmax map (H2O eq. 2, arXiv 2306.14048).

    Sums run over all queries of the row and the query heads of a KV head. With `evict_every`, they continue during
    generation (algorithm 1).
    """

    needs_column_sums: ClassVar[bool] = True

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        assert inputs.column_sums is not None
        return inputs.column_sums

    def update(self, scores: Float[Array, "B K C"], weights: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        """Adds the weights of one more query (algorithm 1)."""
        return scores + weights


register_method(
    Method(
        name="h2o",
        citation="H2O, arXiv 2306.14048: 10 % heavy hitters + 10 % recent window",
        scorer=H2O(),
        heavy=0.1,
        recent=0.1,
    )
)
