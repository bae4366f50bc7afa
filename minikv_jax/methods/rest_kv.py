"""ReST-KV (arXiv 2605.08840; https://github.com/an-yongqi/rest-kv): scores by how far an eviction moves the output."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.votes import attention_weights, check_odd, gather_votes, pool

_VOTERS = 8  # queries at a time: besides their weights, their scores over all keys are in memory


@register_scorer("rest-kv")
class ReSTKV(Scorer):
    """Distance by which a head's output moves without the token (ReST-KV, arXiv 2605.08840).

    Let `A` be a query's weight for the token, `o` its output and `v` the token's value. Without the token, the other
    weights grow by `1 / (1 - A)`, and the output moves by `A / (1 - A) * |o - v|`. This is averaged over the last
    queries and over the query heads of a KV head. (The paper's code can also project `o - v` by the layer's output
    matrix, average `A` and not the score, and fit the number of pooled tokens to the head.)

    Attributes:
      observation_window: number of last queries. Keep their tokens by a `recent` budget of its size, as `rest-kv` does.
      smoothing: 0 for the mean over queries; else the share of each query in an exponential moving average from the
        window's first query to its last.
      pooling: "max" or "mean", over the tokens before the window.
      pooling_kernel: number of tokens that are pooled, odd; 1 pools nothing.

    Raises:
      ValueError: a value out of range, or an even `pooling_kernel`.
    """

    observation_window: int = setting(default=32, at_least=1, at_most=MAX_WINDOW)
    smoothing: float = setting(default=0.0, at_least=0, at_most=1)
    pooling: str = setting(default="mean", choices=("max", "mean"))
    pooling_kernel: int = setting(default=1, at_least=1, at_most=4095)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd(self.pooling_kernel)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        tokens = inputs.k.shape[1]
        size, lengths = min(self.observation_window, tokens), inputs.lengths[:, None]
        valid = jnp.arange(tokens) < lengths
        values = jnp.where(valid[..., None, None], inputs.v.astype(jnp.float32), 0.0).swapaxes(1, 2)  # [B, K, T, H]

        def weigh(back: Array, keys: Array, at: Array) -> Array:
            queries = jnp.where(back < size, lengths - 1 - back, -1)
            moved = _moved(attention_weights(inputs, queries, keys, at), values)
            return moved * self._shares(back, jnp.minimum(lengths, size))[:, None, None, :, None]

        total = gather_votes(inputs, size, weigh, lambda sums, new: sums + jnp.sum(new, axis=(2, 3)), _VOTERS)
        scores = total * (inputs.k.shape[2] / inputs.q.shape[2])
        return pool(scores, inputs.lengths - self.observation_window, self.pooling, self.pooling_kernel)

    def _shares(self, back: Int[Array, "W"], count: Int[Array, "B 1"]) -> Float[Array, "B W"]:
        """Shares of a row's `count` queries in the average, from the newest backwards."""
        if not self.smoothing:
            return jnp.broadcast_to(1.0 / jnp.maximum(count, 1), (count.shape[0], back.shape[0]))
        oldest = back == count - 1  # the moving average begins with it
        return (1.0 - self.smoothing) ** back * jnp.where(oldest, 1.0, self.smoothing)


def _moved(weights: Float[Array, "B K G W T"], values: Float[Array, "B K T H"]) -> Float[Array, "B K G W T"]:
    """Distance of each query's output to that without each token."""
    out = jnp.einsum("bkgwt,bkth->bkgwh", weights, values, precision="highest")
    # A difference of squares would lose what is left of a token that has nearly all the weight. XLA fuses this sum.
    apart = jnp.sqrt(jnp.sum((out[..., None, :] - values[:, :, None, None]) ** 2, axis=-1))
    return weights / jnp.maximum(1.0 - weights, jnp.finfo(jnp.float32).eps) * apart


register_method(
    Method(
        name="rest-kv",
        citation="ReST-KV, arXiv 2605.08840: 1024 tokens by how far the outputs of the last 32 queries move without "
        "them, moving average of 0.3, mean-pooled over 5",
        scorer=ReSTKV(smoothing=0.3, pooling_kernel=5),
        heavy=992,
        recent=32,
    )
)
