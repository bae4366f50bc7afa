"""Expected Attention (arXiv 2510.00636; https://github.com/NVIDIA/kvpress): scores by future queries' attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs, Scorer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.models.rotary import rotate


@register_scorer("expected-attention")
class ExpectedAttention(Scorer):
    """Attention expected from the next `future` queries (Expected Attention section 3, arXiv 2510.00636).

    Queries before RoPE, except those of the sinks, are modelled as normal with their mean `m` and covariance `C`,
    and rotated by the mean rotation `R` of the next positions: `E[exp(q k / sqrt(H))] = exp(Rm k / sqrt(H) + k RCR'
    k / 2H)`. A soft cap of the logits is not modelled. This is normalised over the keys after the sinks (and the
    layer's `sink_logits`) and averaged over the KV head's query heads. The score is that weight plus `epsilon`,
    times the norm of the value. (The paper takes the norm of `W_o v`, which a cache does not know.)

    Attributes:
      future: number of future queries.
      epsilon: added to the weight, so that a value's norm counts even without attention.

    Raises:
      ValueError: `LayerInputs.frequencies` is None.
    """

    future: int = setting(default=512, at_least=1, at_most=MAX_WINDOW)
    epsilon: float = setting(default=0.0, at_least=0, at_most=1e6)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        q, k, lengths, frequencies = inputs.q, inputs.k, inputs.lengths, inputs.frequencies
        if frequencies is None:
            raise ValueError("expected-attention needs the rotary frequencies")
        batch, tokens, _, dim = q.shape
        kv_heads = k.shape[2]
        positions = jnp.arange(tokens)
        used = (positions >= inputs.sinks) & (positions < lengths[:, None])  # [B, T]
        frequencies = jnp.atleast_2d(frequencies)[:, None]  # [B, 1, H/2], or the same for all rows
        mean, covariance = _moments(q, used, positions[:, None] * frequencies)

        ahead = (lengths[:, None] + jnp.arange(self.future))[..., None] * frequencies  # [B, future, H/2]
        cos, sin = (jnp.mean(f(ahead), axis=1, keepdims=True) for f in (jnp.cos, jnp.sin))
        mean = rotate(mean[:, None], cos, sin)[:, 0].reshape(batch, kv_heads, -1, dim)
        flat = rotate(covariance.swapaxes(2, 3).reshape(batch, 1, -1, dim), cos, sin)  # rows, then columns
        flat = flat.reshape(covariance.shape).swapaxes(2, 3)
        covariance = rotate(flat.reshape(batch, 1, -1, dim), cos, sin).reshape(batch, kv_heads, -1, dim, dim)

        keys = k.astype(jnp.float32)
        spread = jnp.einsum("btki,bkgij->btkgj", keys, covariance, precision="highest")
        logits = jnp.einsum("btkh,bkgh->bkgt", keys, mean, precision="highest") * dim**-0.5
        logits += jnp.einsum("btkgh,btkh->bkgt", spread, keys, precision="highest") / (2 * dim)
        seen = jnp.broadcast_to(used[:, None, None], logits.shape)
        logits = jnp.where(seen, logits, -jnp.inf)
        if inputs.sink_logits is not None:
            sinks = inputs.sink_logits.astype(jnp.float32).reshape(kv_heads, -1, 1)
            logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))], axis=-1)
            seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        weights = jax.nn.softmax(logits, axis=-1, where=seen)[..., :tokens]
        norms = jnp.linalg.norm(inputs.v.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        return (jnp.mean(weights, axis=2) + self.epsilon) * norms


def _moments(
    q: Float[Array, "B T N H"], used: Array, angles: Float[Array, "#B T F"]
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H H"]]:
    """Mean and covariance of the `used` queries before RoPE."""
    count = jnp.maximum(jnp.sum(used, axis=1), 1)[:, None, None]
    plain = rotate(q.astype(jnp.float32), jnp.cos(angles), -jnp.sin(angles))
    plain = jnp.where(used[..., None, None], plain, 0.0)
    mean = jnp.sum(plain, axis=1) / count  # [B, N, H]
    centred = jnp.where(used[..., None, None], plain - mean[:, None], 0.0)
    return mean, jnp.einsum("btni,btnj->bnij", centred, centred, precision="highest") / count[..., None]


register_method(
    Method(
        name="expected-attention",
        citation="Expected Attention, arXiv 2510.00636: 50 % by what the next 512 queries are expected to pay, 4 sinks",
        scorer=ExpectedAttention(),
        heavy=0.5,
        recent=0.0,
        sinks=4,
    )
)
