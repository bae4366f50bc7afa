"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values are projected from latents.

It runs as attention of as many KV heads as query heads, over keys and values and not over their latents. A cache so
holds what a method can score, evict and quantise by head, and is larger than one of latents would be. Values are padded
with zeros to the size of the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax.meshes import DATA, MODEL, constrain
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.norms import Norm
from minikv_jax.models.projections import Reduce, linear, project_by_rows, sum_over_devices
from minikv_jax.models.rotary import channel_order, rotate, scaled

_EPSILON = 1e-6  # of the latents' norms, whatever the model's


class LatentAttention(nnx.Module):
    """Attention whose queries, keys and values come from latents; `attend` is the callback of `Attention`."""

    def __init__(self, config: ModelConfig, number: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.latent is not None
        build, latent, bias = linear(dtype, rngs), config.latent, config.attention_bias
        d, h, self.heads = config.hidden_size, config.head_dim, config.num_attention_heads
        self.rotated, self.value_dim = config.rotary_dim or h, latent.value_dim
        self.kv_rank, self.plain = latent.kv_rank, h - self.rotated
        self.q_a_proj = build(d, latent.query_rank, use_bias=bias) if latent.query_rank else None
        self.q_a_norm = _norm(config, latent.query_rank, dtype) if latent.query_rank else None
        self.q_b_proj = build(latent.query_rank or d, self.heads * h, use_bias=False)
        self.kv_a_proj = build(d, latent.kv_rank + self.rotated, use_bias=bias)
        self.kv_a_norm = _norm(config, latent.kv_rank, dtype)
        self.kv_b_proj = build(latent.kv_rank, self.heads * (self.plain + latent.value_dim), use_bias=False)
        self.o_proj = build(self.heads * latent.value_dim, d, use_bias=bias)
        # The rotated channels come last in each head. `rotate` wants them first, in an order of its own.
        order = channel_order(config.rope(number)._replace(rotated=self.rotated), interleaved=latent.interleaved)
        self.order = tuple(((order + self.plain) % h).tolist())
        self.query_scale = config.query_scale
        self.sink_logits = None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        q, k, v = self._queries(x), *self._keys_and_values(x)
        order = np.array(self.order)
        q, k = (rotate(x[..., order], cos, sin) for x in (q, k))
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, len(self.order) - self.value_dim)))
        out = attend(scaled(q, self.query_scale), k, v)[..., : self.value_dim]
        with jax.named_scope("o_proj"):
            return project_by_rows(self.o_proj, out.reshape(*x.shape[:2], -1), reduce)

    @jax.named_scope("qkv_proj")
    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        if self.q_a_proj is not None and self.q_a_norm is not None:
            x = self.q_a_norm(self.q_a_proj(x))
        return self._by_head(self.q_b_proj(x))

    @jax.named_scope("qkv_proj")
    def _keys_and_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N V"]]:
        """Returns keys, whose rotated channels are shared by all heads, and values."""
        latent, rotated = jnp.split(self.kv_a_proj(x), [self.kv_rank], axis=-1)
        plain, v = jnp.split(self._by_head(self.kv_b_proj(self.kv_a_norm(latent))), [self.plain], axis=-1)
        rotated = jnp.broadcast_to(rotated[:, :, None], (*plain.shape[:3], self.rotated))
        return jnp.concatenate([plain, rotated], axis=-1), v

    def _by_head(self, x: Float[Array, "B T C"]) -> Float[Array, "B T N C/N"]:
        return constrain(x.reshape(*x.shape[:2], self.heads, -1), DATA, None, MODEL)


def _norm(config: ModelConfig, size: int, dtype: DTypeLike) -> Norm:
    norm = Norm(config, size, dtype=dtype)
    norm.epsilon = _EPSILON
    return norm
