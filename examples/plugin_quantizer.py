"""Adds a quantizer: 8-bit integers with one scale per token and head.

Try it: minikv evaluate perplexity --plugin examples/plugin_quantizer.py --method absmax --model M --text T
"""

import jax.numpy as jnp

import minikv_jax


@minikv_jax.register_quantizer("absmax")
class AbsMax(minikv_jax.Quantizer):
    """Quantizer to 8 bits per value and 16 per token; what `encode` returns is stored and counted."""

    choices = (8,)

    k_bits: int = 8
    v_bits: int = 8

    def encode(self, x, operand):
        """Encodes x [B, K, S, H] as any pytree of arrays [B, K, S, ...]; `operand` tells keys from values."""
        scale = (jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127).astype(jnp.bfloat16)
        codes = jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale).astype(jnp.float32))
        return {"codes": jnp.clip(codes, -127, 127).astype(jnp.int8), "scale": scale}

    def decode(self, stored, operand):
        """Decodes the stored arrays to numbers [B, K, S, H]."""
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)


minikv_jax.register_method(
    minikv_jax.Method(name="absmax", scorer=minikv_jax.SnapKV(), heavy=0.3, recent=0.1, quantizer=AbsMax())
)
