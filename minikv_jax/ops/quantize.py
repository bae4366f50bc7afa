"""Quantize: group-wise min/max codes and their packing, in one pass over memory (MiniKV section 3.2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from minikv_jax import packing as packing_module
from minikv_jax.arrays import Contract
from minikv_jax.cache.spec import LayerSpec, Packed
from minikv_jax.methods.base import Kind
from minikv_jax.ops import dispatch, kernel_arrays
from minikv_jax.outline import outlined
from minikv_jax.packing import Packing, QuantizedArray


def quantize(x: Float[Array, "B K S H"], packing: Packing, *, implementation: str | None = None) -> QuantizedArray:
    """Quantises keys or values by min/max in groups, and packs them (MiniKV section 3.2, KIVI eq. 1).

    Args:
      x: keys or values, float32, bfloat16 or float16; `S` must fill whole groups and words.
      packing: bits, groups and dtypes; `axis="tokens"` is for keys, `axis="channels"` for values.
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU that supports the inputs.

    Returns:
      Packed codes with their scales and zero points; `dequantize` reads them.

    Raises:
      ValueError: an array of another shape or dtype, or a size that does not fill whole groups and words.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    if not isinstance(packing, Packing):
        raise ValueError(f"quantize: packing is a {type(packing).__name__}: expected a Packing")
    x = Contract("quantize").floating("x", x, "B K S H")
    packing.check(x.shape)
    batch, kv_heads, tokens, head_dim = x.shape
    sizes = {"batch": batch, "tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim, "bits": packing.bits}
    return dispatch.run("quantize", implementation, sizes, _IMPLEMENTATIONS, x, packing, heads=(1,))


@outlined("kind", "spec", "implementation")
@jax.named_scope("compress")
def store(x: Float[Array, "B K S H"], kind: Kind, spec: LayerSpec, implementation: str | None = None) -> Packed:
    """Packs keys or values, given in the basis of the cache, with the method's quantizer or a kernel for it.

    Raises:
      NotImplementedError: an `implementation` that has no kernel for the quantizer.
    """
    quantizer = spec.method.quantizer
    if quantizer is not None and quantizer.kernel_packs:
        return quantize(x, quantizer.packing(kind), implementation=implementation)
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"quantize: {type(quantizer).__name__} has no {implementation!r} kernel; implementation='xla' runs it"
        )
    return spec.encode(x, kind)


def _kernel(implementation: str, x: Array, packing: Packing) -> QuantizedArray:
    options: dict[str, Any] = {"metadata_dtype": packing.metadata_dtype}
    if packing.has_factors:  # 16-bit metadata has none
        options["factor_block"] = packing.block
    kernel = dispatch.package(implementation).quantize
    codes = kernel(x, bits=packing.bits, group_size=packing.group_size, axis=packing.axis, **options)
    return kernel_arrays.quantized(codes, packing)


_IMPLEMENTATIONS = {
    "xla": packing_module.encode_minmax,
    "pallas": functools.partial(_kernel, "pallas"),
    "cuda": functools.partial(_kernel, "cuda"),
}
