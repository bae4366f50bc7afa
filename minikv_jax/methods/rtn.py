"""Round to nearest, per token: FlexGen's group-wise quantisation of the cache (arXiv 2303.06865)."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from minikv_jax import packing
from minikv_jax.methods.base import Operand
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.registry import register_quantizer
from minikv_jax.packing import QuantizedArray


@register_quantizer("rtn")
class RTN(MinMax):
    """Min/max per token, of keys too: groups of `group_size` channels, so that 64 or 128 may be a whole head.

    KIVI (section 3) measures its keys against it. The kernels read only keys grouped by tokens; the dict makes this a
    layout of its own.
    """

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, QuantizedArray]:
        per_token = dataclasses.replace(self.packing(operand.kind), axis="channels")
        return {"packed": packing.encode_minmax(x, per_token)}

    def decode(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return packing.dequantize(stored["packed"])
