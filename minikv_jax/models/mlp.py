"""The feed-forward block, gated or not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax.meshes import DATA, MODEL, constrain
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.projections import Reduce, linear, mlp_columns, project_by_rows, sum_over_devices

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """Feed-forward block: `down(act(gate(x)) * up(x))` (arXiv 2002.05202), or `down(act(up(x)))` without a gate."""

    def __init__(self, config: ModelConfig, size: int | None = None, *, dtype: DTypeLike, rngs: nnx.Rngs):
        build, size = functools.partial(linear(dtype, rngs), use_bias=config.mlp_bias), size or config.intermediate_size
        gated = config.design.gated_mlp
        self.joined = mlp_columns(config, size)
        self.gate_up_proj = build(config.hidden_size, self.joined.columns) if gated else None
        self.up_proj = None if gated else build(config.hidden_size, size)
        self.down_proj = build(size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"], reduce: Reduce = sum_over_devices) -> Float[Array, "B T D"]:
        if self.gate_up_proj is not None:
            with jax.named_scope("gate_up_proj"):
                columns = self.gate_up_proj(x)
            gate, up = jnp.split(self.joined.grouped(columns), 2, axis=-1)  # [B, T, groups, F / groups]
            with jax.named_scope("activation"):
                inner = (self.activation(gate) * up).reshape(*x.shape[:-1], -1)
        else:
            assert self.up_proj is not None
            with jax.named_scope("up_proj"):
                up = self.up_proj(x)
            with jax.named_scope("activation"):
                inner = constrain(self.activation(up), DATA, None, MODEL)
        with jax.named_scope("down_proj"):
            return project_by_rows(self.down_proj, inner, reduce)
