"""TurboQuant-MSE (Zandieh et al. 2025, arXiv 2504.19874): rotates keys and values and stores norm and direction."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax import packing
from minikv_jax.fields import setting
from minikv_jax.methods.base import Operand, Quantizer
from minikv_jax.methods.kivi import word_tokens
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method, register_quantizer


@register_quantizer("turboquant")
class TurboQuant(Quantizer):
    """Norm and quantised direction of every token after a random rotation (TurboQuant algorithm 1, arXiv 2504.19874).

    Each coordinate is coded with the scalar codebook of least mean squared error for a random unit vector.

    Attributes:
      k_bits, v_bits: bits per coordinate of keys and of values: 1, 2, 3 or 4.
      metadata_dtype: dtype of the norms, one per token: "float16" or "bfloat16".
      seed: seed of the rotation.
    """

    choices: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    k_bits: int = 4
    v_bits: int = 4
    metadata_dtype: str = setting(default="float16", choices=("float16", "bfloat16"))
    seed: int = setting(default=0, at_least=0, at_most=2**63 - 1)

    @property
    def block(self) -> int:
        return word_tokens(self)

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del operand
        return jnp.asarray(random_rotation(head_dim, self.seed))

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, Any]:
        bits = self.bits(operand.kind)
        x = x.astype(jnp.float32)
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        levels = lloyd_max(x.shape[-1], bits)
        unit = x / jnp.where(norm == 0, 1.0, norm)
        codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), unit).astype(jnp.uint32)
        largest = float(jnp.finfo(self.metadata_dtype).max)
        return {
            "planes": packing.pack(codes, bits),
            "norm": jnp.minimum(norm, largest).astype(self.metadata_dtype),
        }

    def decode(self, stored: dict[str, Any], operand: Operand) -> Float[Array, "B K S H"]:
        bits = self.bits(operand.kind)
        codes = packing.unpack(stored["planes"], bits)
        levels = jnp.asarray(lloyd_max(codes.shape[-1], bits))
        return levels[codes] * stored["norm"].astype(jnp.float32)


@functools.cache
def random_rotation(size: int, seed: int) -> np.ndarray:
    """Draws a uniformly random orthogonal matrix, float32 `[H, H]`."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@functools.cache
def lloyd_max(size: int, bits: int) -> np.ndarray:
    """Computes the `2**bits` levels of least mean squared error for a coordinate of a random unit vector, float32.

    A coordinate of a vector of `size` has the density `(1 - x**2) ** ((size - 3) / 2)`. Lloyd's iteration runs on a
    fine grid.
    """
    grid = np.linspace(-1, 1, 200_001)[1:-1]
    density = np.exp((size - 3) / 2 * np.log1p(-(grid**2)))
    mass, moment = np.cumsum(density), np.cumsum(density * grid)
    levels = grid[np.searchsorted(mass / mass[-1], (np.arange(1 << bits) + 0.5) / (1 << bits))]
    for _ in range(1000):
        edges = np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        parts = [np.diff(total[edges - 1], prepend=0.0, append=total[-1]) for total in (moment, mass)]
        new = parts[0] / parts[1]
        done, levels = np.abs(new - levels).max() < 1e-9, new
        if done:
            break
    return levels.astype(np.float32)


register_method(
    Method(
        name="turboquant-4",
        citation="TurboQuant-MSE, arXiv 2504.19874: every token, 4 bits and a norm",
        quantizer=TurboQuant(),
    )
)
