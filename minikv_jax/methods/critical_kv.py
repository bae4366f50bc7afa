"""CriticalKV (arXiv 2502.03805; https://github.com/FFY0/DefensiveKV): scores by weights and projected values."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.snapkv import SnapKV

_PROJECTED = 1 << 24  # projected channels at a time, in float32


@register_scorer("criticalkv")
class CriticalKV(SnapKV):
    """Two stages: by attention weights, then by weights times the norms of projected values (arXiv 2502.03805).

    The first stage chooses a part of the heavy budget by the pooled mean weights `A` of the last queries (SnapKV). The
    second one fills the rest by `(A + epsilon) * |W_o v|_1`, which bounds how far an eviction moves the layer's output;
    the norm is the mean over the query heads of a KV head, whose parts of the output projection `W_o` differ.

    All models of this library have that matrix. `prefill_layer` needs it as `LayerInputs.output_projection`.

    Attributes:
      first_stage: fraction of the heavy budget that the first stage chooses.
      epsilon: added to the weight, so that a value's norm counts even without attention.

    Raises:
      ValueError: a value out of range, or `LayerInputs.output_projection` is None.
    """

    needs_output_projection: ClassVar[bool] = True

    first_stage: float = setting(default=0.5, at_least=0, at_most=1)
    epsilon: float = setting(default=1e-4, at_least=0, at_most=1e6)

    @property
    def first_share(self) -> float:
        return self.first_stage

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        group = inputs.q.shape[2] // inputs.k.shape[2]
        voters = group * jnp.clip(inputs.lengths, 1, self.observation_window)
        return super().score(inputs) / voters[:, None, None]

    def rescore(self, inputs: LayerInputs, scores: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
        if inputs.output_projection is None:
            raise ValueError("criticalkv needs LayerInputs.output_projection")
        heads = inputs.q.shape[2]
        norms = _projected_norms(
            inputs.v, inputs.output_projection.reshape(heads, -1, inputs.output_projection.shape[-1])
        )
        return (scores + self.epsilon) * norms


def _projected_norms(v: Float[Array, "B T K H"], projection: Float[Array, "N V D"]) -> Float[Array, "B K T"]:
    """Mean over a KV head's query heads of the L1 norm of its projected values."""
    batch, _, kv_heads, _ = v.shape
    heads, channels, width = projection.shape
    by_head = projection.reshape(kv_heads, -1, channels, width)

    def norms(v: Float[Array, "B K V"]) -> Float[Array, "B K"]:
        out = jnp.einsum("bkv,kgvd->bkgd", v, by_head, precision="highest", preferred_element_type=jnp.float32)
        return jnp.mean(jnp.sum(jnp.abs(out), axis=-1), axis=-1)

    at_once = max(_PROJECTED // (batch * heads * width), 1)
    return jax.lax.map(norms, v.swapaxes(0, 1)[..., :channels], batch_size=at_once).transpose(1, 2, 0)


register_method(
    Method(
        name="criticalkv",
        citation="CriticalKV, arXiv 2502.03805: 1024 tokens, half by the votes of the last 32 queries, half by votes "
        "times the L1 norm of the projected value",
        scorer=CriticalKV(),
        heavy=992,
        recent=32,
    )
)
