"""A quantizer of your own: 8-bit integers, one scale per token and head.

Try it: minikv evaluate perplexity --plugin examples/plugin_quantizer.py --method absmax --model M --text T
"""

import jax.numpy as jnp

import minikv_jax


@minikv_jax.register_quantizer("absmax")
class AbsMax(minikv_jax.Quantizer):
    """What `encode` returns is what is stored and counted: 8 bits per value and 16 per token."""

    choices = (8,)

    k_bits: int = 8
    v_bits: int = 8

    def encode(self, x, operand):
        """X [B, K, S, H] -> any pytree of arrays [B, K, S, ...]; `operand` tells keys from values."""
        scale = (jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127).astype(jnp.bfloat16)
        codes = jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale).astype(jnp.float32))
        return {"codes": jnp.clip(codes, -127, 127).astype(jnp.int8), "scale": scale}

    def decode(self, stored, operand):
        """The numbers that the stored arrays stand for, [B, K, S, H]."""
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)


minikv_jax.register_method(
    minikv_jax.Method(name="absmax", scorer=minikv_jax.SnapKV(), heavy=0.3, recent=0.1, quantizer=AbsMax())
)
