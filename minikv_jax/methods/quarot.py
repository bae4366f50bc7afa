"""QuaRot (arXiv 2404.00456; https://github.com/spcl/QuaRot): min/max quantisation in a Hadamard-rotated basis."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import KIVI_2, MinMax
from minikv_jax.methods.registry import register_method, register_quantizer


@register_quantizer("hadamard")
class Hadamard(MinMax):
    """Min/max quantisation of keys and values rotated by a Hadamard matrix (QuaRot section 4.2, arXiv 2404.00456).

    The rotation spreads outliers over all channels. Settings are those of `MinMax`.
    """

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del operand
        return jnp.asarray(hadamard(head_dim))


def hadamard(size: int) -> np.ndarray:
    """Orthogonal float32 `[H, H]`: blocks of Sylvester's matrix of the largest power of two that divides `H`."""
    block = np.ones((1, 1), np.float32)
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block), dtype=np.float32), block / np.sqrt(np.float32(len(block))))


register_method(
    dataclasses.replace(
        KIVI_2,
        name="kivi-2-hadamard",
        citation=KIVI_2.citation + ", turned by a Hadamard matrix (QuaRot, arXiv 2404.00456)",
        quantizer=Hadamard(k_bits=2, v_bits=2, group_size=32),
    )
)
