"""KIVI (arXiv 2402.02750; https://github.com/jy-yuan/KIVI): quantises keys per channel and values per token."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from minikv_jax import packing
from minikv_jax.fields import setting
from minikv_jax.methods.base import Kind, Operand, Quantizer
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.registry import register_method, register_quantizer
from minikv_jax.packing import GROUP_SIZES, METADATA_DTYPES, PLANES, Axis, Packing

_AXES: dict[Kind, Axis] = {"keys": "tokens", "values": "channels"}


@register_quantizer("minmax")
class MinMax(Quantizer):
    """Asymmetric min/max in groups, keys per channel and values per token (KIVI eq. 1; MiniKV section 3.2).

    Attributes:
      k_bits, v_bits: bits per code of keys and of values: 1, 2, 3, 4 or 8.
      group_size: number of values that share a scale and a zero point: 16, 32, 64 or 128.
      metadata_dtype: dtype of scales and zero points: "float16", "bfloat16", or "float8_e4m3fn" with a float32 factor
        per packing block.
    """

    kernel_packs: ClassVar[bool] = True
    kernel_reads: ClassVar[bool] = True

    group_size: int = setting(default=16, choices=GROUP_SIZES)
    metadata_dtype: str = setting(default="float16", choices=METADATA_DTYPES)

    @property
    def block(self) -> int:
        """Smallest number of tokens that fills whole groups and words of keys and of values."""
        return max(self.group_size, word_tokens(self))

    def packing(self, kind: Kind) -> Packing:
        """Returns the packing of the keys or the values."""
        return Packing(self.bits(kind), self.group_size, _AXES[kind], self.metadata_dtype, self.block)

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> Any:
        return packing.encode_minmax(x, self.packing(operand.kind))

    def decode(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return packing.dequantize(stored)


def word_tokens(quantizer: Quantizer) -> int:
    """Number of tokens in a word of the narrowest plane of keys and values."""
    return 32 // min(PLANES[quantizer.k_bits] + PLANES[quantizer.v_bits])


KIVI_2 = register_method(
    Method(
        name="kivi-2",
        citation="KIVI, arXiv 2402.02750: every token, 2 bits in groups of 32, the last 128 values and the keys since "
        "the last multiple of 128 in full precision",
        quantizer=MinMax(k_bits=2, v_bits=2, group_size=32),
        tail=Tail(length=128, rule="kivi"),
    )
)
register_method(
    dataclasses.replace(
        KIVI_2,
        name="kivi-4",
        citation=KIVI_2.citation.replace("2 bits", "4 bits"),
        quantizer=MinMax(k_bits=4, v_bits=4, group_size=32),
    )
)
