"""GRKV (arXiv 2605.31105): refits the values of the kept tokens by ridge regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import KeptTokens, LayerInputs, Refit
from minikv_jax.methods.registry import register_refit
from minikv_jax.methods.turned import AHEAD, turned_queries
from minikv_jax.methods.votes import UNSEEN, causal_weights


@register_refit("ridge")
class Ridge(Refit):
    """Ridge regression of the values on what the newest queries read from the whole prompt (GRKV, arXiv 2605.31105).

    Let `A` be the weights of the last `queries` queries, of all query heads of a KV head, over the whole prompt, and
    `X` those over the kept keys alone, as they are stored. The new values are `V + X' (X X' + c I)^-1 (A V_all - X V)`:
    they bring the output of these queries back, and stay as close to the old values as the ridge `c` demands, which is
    `strength` times the mean of the diagonal of `X' X`.

    Attributes:
      queries: number of last queries.
      strength: of the ridge. More of it leaves the values closer to the old ones.
      turned: number of further queries, of the whole prompt, turned to a position after it (`turned.turned_queries`).
        They want what a continuation will want. GRKV has none.

    Raises:
      ValueError: `turned` without `LayerInputs.frequencies`.
    """

    queries: int = setting(default=32, at_least=1, at_most=1024)
    strength: float = setting(default=1e-2, above=0, at_most=1e6)
    turned: int = setting(default=0, at_least=0, at_most=1024)

    def values(self, inputs: LayerInputs, kept: KeptTokens) -> Float[Array, "B K M H"]:
        batch, tokens, kv_heads, _ = inputs.k.shape
        newest = inputs.lengths[:, None] - 1 - jnp.arange(self.queries)  # negative where the row has no such query
        q = jnp.take_along_axis(inputs.q, jnp.maximum(newest, 0)[:, :, None, None], axis=1)
        if self.turned:
            further, after = turned_queries(inputs, jnp.arange(self.turned), self.turned, AHEAD)
            q, newest = jnp.concatenate([q, further], axis=1), jnp.concatenate([newest, after], axis=1)
        at = jnp.broadcast_to(jnp.arange(tokens), (batch, kv_heads, tokens))
        at = jnp.where(at < kept.lengths[:, None, None], at, UNSEEN)  # neither padding nor tokens after the prompt
        kept_at = jnp.where(kept.positions < tokens, kept.positions, UNSEEN)
        whole = causal_weights(inputs, q, newest, inputs.k.swapaxes(1, 2), at)  # [B, K, G, W, T]
        weights = causal_weights(inputs, q, newest, kept.keys, kept_at)  # [B, K, G, W, M]
        prompt = jnp.where((at < tokens)[..., None], inputs.v.swapaxes(1, 2).astype(jnp.float32), 0.0)
        rows = (batch, kv_heads, -1)
        x = weights.reshape(*rows, weights.shape[-1])
        missing = _product(whole.reshape(*rows, tokens), prompt) - _product(x, kept.values)
        gram = jnp.einsum("bknm,bkpm->bknp", x, x, precision="highest")
        mean = jnp.trace(gram, axis1=2, axis2=3) / jnp.maximum(jnp.sum(kept.positions < tokens, axis=2), 1)
        ridge = self.strength * mean[:, :, None, None] + jnp.finfo(jnp.float32).tiny
        factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(gram.shape[-1]))
        return kept.values + _product(x.swapaxes(2, 3), jax.scipy.linalg.cho_solve(factor, missing))


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")
