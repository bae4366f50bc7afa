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
    """Min/max quantisation per token, for keys as well as values (round to nearest; FlexGen, arXiv 2303.06865).

    Groups are `group_size` consecutive channels, so that 64 or 128 may be a whole head. KIVI (section 3) compares its
    keys with this. Settings are those of `MinMax`. Computed in plain JAX, because kernels read only keys grouped by
    tokens.
    """

    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, QuantizedArray]:
        per_token = dataclasses.replace(self.packing(operand.kind), axis="channels")
        return {"packed": packing.encode_minmax(x, per_token)}

    def decode(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return packing.dequantize(stored["packed"])
