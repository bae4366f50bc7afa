"""LagKV (arXiv 2504.04704): scores tokens by their spread relative to the tokens after them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer


@register_scorer("lagkv")
class LagKV(Scorer):
    """Spread of keys and values relative to the range of the tokens after them (LagKV section 2.2, arXiv 2504.04704).

    After the sinks, tokens form partitions of `lag`. Each token is scaled per channel to the smallest and largest value
    of the next partition. Its score is the standard deviation over channels, as a softmax over the partition, averaged
    over keys and values. Only the rank within the partition counts, so every partition keeps equally many tokens.
    Tokens without a full partition after theirs come before all others, the newest first.

    Attributes:
      lag: tokens per partition.
    """

    lag: int = setting(default=128, at_least=1, at_most=MAX_WINDOW)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        lag, sinks, tokens = self.lag, inputs.sinks, inputs.k.shape[1]
        count = max(-(-(tokens - sinks) // lag), 1)

        def partitions(x: Array) -> Array:
            """Splits tokens into `[B, K, partitions, lag, H]`, with zeros after the end."""
            x = x[:, sinks : sinks + count * lag].astype(jnp.float32)
            x = jnp.pad(x, [(0, 0), (0, count * lag - x.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)
            return x.reshape(*x.shape[:2], count, lag, -1)

        score = (_spread(partitions(inputs.k)) + _spread(partitions(inputs.v))) / 2
        rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1) / lag  # [B, K, partitions, lag], in [0, 1)
        rank = rank.reshape(*rank.shape[:2], -1)[:, :, : max(tokens - sinks, 0)]
        rank = jnp.pad(rank, [(0, 0), (0, 0), (tokens - rank.shape[2], 0)])
        positions = jnp.arange(tokens)
        partition = (positions - sinks) // lag
        has_next = (positions >= sinks) & (sinks + (partition + 2) * lag <= inputs.lengths[:, None])  # [B, T]
        return jnp.where(has_next[:, None], rank, 1 + positions / tokens)


def _spread(x: Float[Array, "B K P L H"]) -> Float[Array, "B K P L"]:
    """Softmax of the tokens' standard deviations over a partition, scaled to the next partition's range."""
    low, high = x.min(axis=3, keepdims=True), x.max(axis=3, keepdims=True)
    low, high = jnp.roll(low, -1, axis=2), jnp.roll(high, -1, axis=2)
    scaled = (x - low) / jnp.where(high == low, 1.0, high - low)
    return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)


register_method(
    Method(
        name="lagkv",
        citation="LagKV, arXiv 2504.04704: 25 % by spread against the next 128 tokens, 16 sinks",
        scorer=LagKV(),
        heavy=0.25,
        recent=0.0,
        sinks=16,
    )
)
