"""Norms of all kinds, reduced in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax.models.config import ModelConfig


class Norm(nnx.Module):
    """Normalisation over the last axes: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450) and their variants.

    Args:
      config: names the kind (`Design.norm`) and the epsilon.
      shape: shape of the weight, equal to the last axes of the inputs.
      axes: number of the last axes that are normalised together.
      weighted: the norm has a weight.
      stored: shape of the stored parameters; by default one axis.
      dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *shape: int,
        axes: int = 1,
        weighted: bool = True,
        stored: tuple[int, ...] = (),
        dtype: DTypeLike,
    ):
        form = config.design.norm_form
        self.shape, self.axes, self.epsilon = shape, axes, config.rms_norm_eps
        self.centred, self.plus_one = form.centred, float(form.plus_one)
        size = stored or (math.prod(shape),)
        first = jnp.zeros if self.plus_one else jnp.ones
        self.scale = nnx.Param(first(size, dtype)) if form.weighted and weighted else None
        self.bias = nnx.Param(jnp.zeros(size, dtype)) if form.biased else None

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
        over = tuple(range(-self.axes, 0))
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=over, keepdims=True)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=over, keepdims=True) + self.epsilon)
        if self.scale is None:
            return normal.astype(x.dtype)
        shape = (1,) * (x.ndim - len(self.shape)) + self.shape
        scale = self.scale[...].reshape(shape)
        if not (self.centred or self.plus_one):
            return normal.astype(x.dtype) * scale
        normal = normal * (scale.astype(jnp.float32) + self.plus_one)
        if self.bias is not None:
            normal = normal + self.bias[...].reshape(shape).astype(jnp.float32)
        return normal.astype(x.dtype)
