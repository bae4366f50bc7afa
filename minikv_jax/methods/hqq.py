"""HQQ (Badri and Shaji 2023; https://github.com/mobiusml/hqq): zero points by half-quadratic splitting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax import packing
from minikv_jax.fields import setting
from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.registry import register_quantizer
from minikv_jax.packing import QuantizedArray


@register_quantizer("hqq")
class HQQ(MinMax):
    """Min/max scales with zero points that minimise a sparse norm of the error (HQQ, Badri and Shaji 2023).

    Half-quadratic splitting alternates `e = shrink(x - r)`, with `r` the restored values, and
    `zero = mean(x - e - code * scale)`, while `beta` grows. Each group keeps the zero point with the smallest mean
    absolute error of all steps. (HQQ's own code stops all groups together as soon as the error grows.)

    Attributes:
      iterations: number of steps; 0 is `MinMax`.
      norm: exponent `p` of the norm, in (0, 1].
      beta: initial weight of the quadratic term.
      growth: factor by which `beta` grows per step.
    """

    iterations: int = setting(default=20, at_least=0, at_most=1000)
    norm: float = setting(default=0.7, above=0, at_most=1)
    beta: float = setting(default=10.0, above=0, at_most=1e6)
    growth: float = setting(default=1.01, at_least=1, at_most=2)

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        rule = self.packing(operand.kind)
        groups = packing.grouped(x, rule)
        low, steps = packing.minmax(groups, rule)
        scale = jnp.expand_dims(jnp.where(steps > 0, steps, 1.0), rule.reduced)
        power = self.norm - 1

        def restored(zero: Array) -> Array:
            return jnp.clip(jnp.round((groups - zero) / scale), 0, (1 << rule.bits) - 1) * scale

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            zero, best, smallest = state
            codes = restored(zero)
            gap = groups - codes - zero
            error = jnp.mean(jnp.abs(gap), axis=rule.reduced, keepdims=True)
            best, smallest = jnp.where(error < smallest, zero, best), jnp.minimum(error, smallest)
            size, beta = jnp.abs(gap), self.beta * self.growth**i
            sparse = jnp.sign(gap) * jnp.maximum(size - jnp.where(size > 0, size, 1.0) ** power / beta, 0.0)
            return jnp.mean(groups - sparse - codes, axis=rule.reduced, keepdims=True), best, smallest

        zero = jnp.expand_dims(low, rule.reduced)
        start = zero, zero, jnp.full_like(zero, jnp.inf)
        _, best, _ = jax.lax.fori_loop(0, self.iterations + 1, step, start)
        return packing.encode(x, jnp.squeeze(best, rule.reduced), steps, rule)
