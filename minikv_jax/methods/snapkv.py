"""SnapKV (arXiv 2404.14469; https://github.com/FasterDecoding/SnapKV): scores by the votes of the last queries."""

from __future__ import annotations

from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.votes import check_odd, pool


@register_scorer("snapkv")
class SnapKV(Scorer):
    """Votes of the last queries, pooled along tokens (SnapKV section 4, arXiv 2404.14469).

    Only the tokens before the window are pooled, as in SnapKV's own code, so that votes for keys of the window do not
    reach the tokens just before it. Keep the window itself by a `recent` budget of its size, as `snapkv` does.

    Attributes:
      observation_window: number of last queries that vote.
      pooling: "max" or "mean".
      pooling_kernel: number of tokens that are pooled, odd.

    Raises:
      ValueError: a value out of range, or an even `pooling_kernel`.
    """

    observation_window: int = setting(default=32, at_least=1, at_most=MAX_WINDOW)
    pooling: str = setting(default="max", choices=("max", "mean"))
    pooling_kernel: int = setting(default=7, at_least=1, at_most=4095)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd(self.pooling_kernel)

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (self.observation_window,)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        before_window = inputs.lengths - self.observation_window
        return pool(inputs.votes[0], before_window, self.pooling, self.pooling_kernel)


register_method(
    Method(
        name="snapkv",
        citation="SnapKV, arXiv 2404.14469: 1024 tokens by the votes of the last 32 queries, max-pooled over 7",
        scorer=SnapKV(),
        heavy=992,
        recent=32,
    )
)
