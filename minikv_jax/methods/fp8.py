"""FP8 (arXiv 2209.05433): stores keys and values as eight-bit floats."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import Operand, Quantizer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_quantizer


@register_quantizer("fp8")
class FP8(Quantizer):
    """Eight-bit floats without a scale; large values saturate (arXiv 2209.05433, table 1).

    Attributes:
      k_bits, v_bits: bits of a key and of a value, always 8.
      format: "e4m3" or "e5m2", bits of exponent and mantissa.
    """

    choices: ClassVar[tuple[int, ...]] = (8,)

    k_bits: int = 8
    v_bits: int = 8
    format: str = setting(default="e4m3", choices=("e4m3", "e5m2"))

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> Array:
        del operand
        dtype = jnp.float8_e4m3fn if self.format == "e4m3" else jnp.float8_e5m2
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(x.astype(jnp.float32), -largest, largest).astype(dtype)

    def decode(self, stored: Array, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return stored.astype(jnp.float32)


register_method(Method(name="fp8", citation="FP8, arXiv 2209.05433: every token, 8-bit floats (e4m3)", quantizer=FP8()))
