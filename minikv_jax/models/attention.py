"""Self-attention: projections, norms and rotation around a callback that attends."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.norms import Norm
from minikv_jax.models.projections import Reduce, joined, linear, project_by_rows, sum_over_devices
from minikv_jax.models.rotary import rotate, scaled


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv 2305.13245): projections, norms and rotation around a callback `attend`."""

    def __init__(self, config: ModelConfig, number: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        build = linear(dtype, rngs)
        d, h = config.hidden_size, config.head_dim
        self.joined = joined(config, "qkv_proj")
        self.qkv_proj = build(d, self.joined.columns, use_bias=config.qkv_bias)
        self.o_proj = build(config.num_attention_heads * h, d, use_bias=config.attention_bias)
        self.group, self.head_dim = config.num_attention_heads // config.num_key_value_heads, h
        self.q_norm = _head_norm(config, number, self.group, dtype)
        self.k_norm = _head_norm(config, number, 1, dtype)
        sinks = nnx.Param(jnp.zeros((config.num_attention_heads,), dtype)) if config.design.attention_sinks else None
        self.sink_logits = sinks
        self.norm_after_rope = config.design.qk_norm_after_rope
        self.query_scale = config.query_scale

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        group, head_dim = self.group, self.head_dim
        batch, tokens, _ = x.shape
        with jax.named_scope("qkv_proj"):
            qkv = self.qkv_proj(x)
        qkv = self.joined.grouped(qkv).reshape(batch, tokens, -1, group + 2, head_dim)
        qk, v = qkv[:, :, :, : group + 1], qkv[:, :, :, -1]
        if not self.norm_after_rope:
            qk = self._normalise(qk)
        # Queries and keys are rotated together, which saves a kernel per layer.
        qk = rotate(qk.reshape(batch, tokens, -1, head_dim), cos, sin).reshape(qk.shape)
        if self.norm_after_rope:
            qk = self._normalise(qk)
        q, k = qk[:, :, :, :group].reshape(batch, tokens, -1, head_dim), qk[:, :, :, group]
        out = attend(scaled(q, self.query_scale), k, v)  # [B, T, N, H]
        with jax.named_scope("o_proj"):
            return project_by_rows(self.o_proj, out.reshape(batch, tokens, -1), reduce)

    def _normalise(self, qk: Float[Array, "B T K G1 H"]) -> Float[Array, "B T K G1 H"]:
        """Normalises the queries and keys of each KV head, if the model does."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        return jnp.concatenate([self.q_norm(qk[:, :, :, : self.group]), self.k_norm(qk[:, :, :, self.group :])], axis=3)


def _head_norm(config: ModelConfig, layer: int, group: int, dtype: DTypeLike) -> Norm | None:
    """Makes the norm of `group` heads for each KV head, as `Design.qk_norm` says."""
    heads = (config.num_key_value_heads, group, config.head_dim)
    match config.design.qk_norm:
        case None:
            return None
        case "rotated":
            rotated = layer not in config.unrotated_layers
            return Norm(config, config.head_dim, weighted=False, dtype=dtype) if rotated else None
        case "head":
            return Norm(config, config.head_dim, dtype=dtype)
        case "each_head":
            return Norm(config, *heads, stored=(heads[0] * group, config.head_dim), dtype=dtype)
        case "projection":
            return Norm(config, *heads, axes=3, dtype=dtype)
