"""How kept tokens are stored: the quantisers by name, and what the cache calls to store and to read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax import attention, quantization
from minikv_jax.config import PLANES, CacheConfig
from minikv_jax.quantization import Axis, QuantizedArray, StoredArray
from minikv_jax.schemes import QUANTIZERS, Kind, Operand, Quantizer, register_quantizer

Packed = QuantizedArray | StoredArray

_AXES: dict[Kind, Axis] = {"keys": "tokens", "values": "channels"}


def quantize(x: Float[Array, "B K S H"], operand: Operand, implementation: str | None = None) -> Packed:
    """Stores `S` tokens, a multiple of the packing block.

    Raises:
      NotImplementedError: an `implementation` that has no kernel for the method's quantiser.
    """
    config = operand.config
    quantizer = QUANTIZERS[config.quantizer]
    if isinstance(quantizer, MinMax):
        return attention.quantize(x, **_minmax(operand), implementation=implementation)
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"quantize: quantizer={config.quantizer!r} has no {implementation!r} kernel; implementation='xla' runs it"
        )
    stored = quantizer.quantize(x, operand)
    return stored if isinstance(stored, QuantizedArray) else StoredArray(stored, x.shape[2])


def dequantize(packed: Packed, operand: Operand, dtype: DTypeLike) -> Float[Array, "B K S H"]:
    """The tokens that `packed` stands for, rounded to `dtype` once."""
    stored = packed.arrays if isinstance(packed, StoredArray) else packed
    return QUANTIZERS[operand.config.quantizer].dequantize(stored, operand).astype(dtype)


def rotate(x: Float[Array, "*lead H"], operand: Operand, *, back: bool = False) -> Float[Array, "*lead H"]:
    """Turns vectors into the basis in which the cache holds `operand`, or back out of it."""
    if not operand.config.quantized:
        return x
    rotation = QUANTIZERS[operand.config.quantizer].rotation(operand, x.shape[-1])
    if rotation is None:
        return x
    rotation = rotation.T if back else rotation
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(x.astype(jnp.float32), rotation.astype(jnp.float32), precision=exact).astype(x.dtype)


def packed_bytes(config: CacheConfig, layer: int, tokens: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of the keys and values of one row's `tokens` packed tokens, from the shapes that the quantiser returns."""
    if not config.quantized:
        return 0
    block = jax.ShapeDtypeStruct((1, kv_heads, config.packing_block, head_dim), dtype)
    stored = [
        jax.eval_shape(lambda x, operand=operand: quantize(x, operand), block)
        for operand in (Operand("keys", layer, config), Operand("values", layer, config))
    ]
    return tokens // config.packing_block * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def _minmax(operand: Operand) -> dict:
    config = operand.config
    return {
        "bits": operand.bits,
        "group_size": config.group_size,
        "axis": _AXES[operand.kind],
        "metadata_dtype": config.metadata_dtype,
        "factor_block": config.packing_block,
    }


@register_quantizer("minmax")
class MinMax(Quantizer):
    """Asymmetric min/max in groups, keys per channel and values per token (KIVI eq. 1; MiniKV section 3.2)."""

    def block(self, config: CacheConfig) -> int:
        """The smallest count that fills whole groups and whole words."""
        assert config.k_bits is not None and config.v_bits is not None
        return max(config.group_size, 32 // min(PLANES[config.k_bits] + PLANES[config.v_bits]))

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        return quantization.quantize(x, **_minmax(operand))

    def dequantize(self, stored: QuantizedArray, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return quantization.dequantize(stored)


@register_quantizer("hadamard")
class Hadamard(MinMax):
    """Min/max of keys and values turned by a Hadamard matrix, which spreads outlying channels (QuaRot section 4.2)."""

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del operand
        return jnp.asarray(hadamard(head_dim))


def hadamard(size: int) -> np.ndarray:
    """An orthogonal float32 `[H, H]`: Sylvester's matrix of the largest power of two dividing `H`, block by block."""
    block = np.ones((1, 1), np.float32)
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block), dtype=np.float32), block / np.sqrt(np.float32(len(block))))
