"""NVFP4, the four-bit format of NVIDIA's Blackwell ("Introducing NVFP4", NVIDIA 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax import packing
from minikv_jax.methods.base import Operand, Quantizer
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_quantizer
from minikv_jax.packing import Packing

# Magnitudes of a four-bit float (E2M1), and the midpoints between them. Ties go to the even code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_MIDPOINTS = (_E2M1[1:] + _E2M1[:-1]) / 2
_GROUPS = Packing(bits=4, group_size=16, axis="channels")


@register_quantizer("nvfp4")
class NVFP4(Quantizer):
    """Four-bit floats (E2M1) with an 8-bit scale per 16 channels of a token ("Introducing NVFP4", NVIDIA 2025).

    A float32 factor per head and block of 32 tokens scales the 8-bit scales. (NVIDIA's format has one per tensor; here
    blocks must not depend on each other.) Computed in plain JAX.

    Attributes:
      k_bits, v_bits: bits of a code, always 4.
    """

    choices: ClassVar[tuple[int, ...]] = (4,)

    k_bits: int = 4
    v_bits: int = 4

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, Any]:
        del operand
        groups = packing.grouped(x, _GROUPS)  # [B, K, S, H/16, 16]
        ideal = jnp.max(jnp.abs(groups), axis=-1) / _E2M1[-1]  # [B, K, S, H/16]
        tiles = ideal.reshape(*ideal.shape[:2], -1, self.block * ideal.shape[-1])
        factor = jnp.max(tiles, axis=-1, keepdims=True) / 448  # float8_e4m3fn reaches 448
        scale = (tiles / jnp.where(factor == 0, 1.0, factor)).astype(jnp.float8_e4m3fn)
        used = (scale.astype(jnp.float32) * factor).reshape(ideal.shape)[..., None]
        ratio = groups / jnp.where(used == 0, 1.0, used)
        size, even = jnp.abs(ratio)[..., None], np.arange(7) % 2 == 0
        above = jnp.where(even, size > _E2M1_MIDPOINTS, size >= _E2M1_MIDPOINTS)
        codes = jnp.sum(above, axis=-1, dtype=jnp.uint32) + 8 * (ratio < 0).astype(jnp.uint32)
        return {
            "planes": packing.pack(codes.reshape(x.shape), 4),
            "scale": scale.reshape(ideal.shape),
            "factor": factor,
        }

    def decode(self, stored: dict[str, Any], operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        codes = packing.unpack(stored["planes"], 4)
        values = jnp.concatenate([jnp.asarray(_E2M1), -jnp.asarray(_E2M1)])[codes]
        scale = stored["scale"].astype(jnp.float32)
        tiles = scale.reshape(*stored["factor"].shape[:-1], -1) * stored["factor"]
        groups = packing.grouped(values, _GROUPS)
        return (groups * tiles.reshape(scale.shape)[..., None]).reshape(values.shape)


register_method(
    Method(
        name="nvfp4",
        citation="NVFP4 (NVIDIA, 2025): every token, 4-bit floats, an 8-bit scale per 16 channels",
        quantizer=NVFP4(),
    )
)
