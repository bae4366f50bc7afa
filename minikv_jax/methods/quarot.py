"""QuaRot (arXiv 2404.00456; https://github.com/spcl/QuaRot): min/max quantisation in a Hadamard-rotated basis."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import KIVI_2, MinMax
from minikv_jax.methods.method import Tail
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


KIVI_2_HADAMARD = register_method(
    dataclasses.replace(
        KIVI_2,
        name="kivi-2-hadamard",
        citation=KIVI_2.citation + ", turned by a Hadamard matrix (QuaRot, arXiv 2404.00456)",
        quantizer=Hadamard(k_bits=2, v_bits=2, group_size=32),
    )
)
# Groups of 16 with 8-bit metadata take no more bytes than groups of 32 with 16-bit metadata.
register_method(
    dataclasses.replace(
        KIVI_2_HADAMARD,
        name="hadamard-2bit",
        citation="minikv_jax: as kivi-2-hadamard, in groups of 16 with 8-bit metadata, the last 96 instead of 128, 4 "
        "sinks; no more bytes than kivi-2",
        sinks=4,
        tail=Tail(length=96, rule="kivi"),
        quantizer=Hadamard(k_bits=2, v_bits=2, group_size=16, metadata_dtype="float8_e4m3fn"),
    )
)
