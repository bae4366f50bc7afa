"""Converts a layer's cache to the arguments of the kernel packages, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from minikv_jax.cache.state import LayerCache, Region
from minikv_jax.methods.base import Kind
from minikv_jax.ops import dispatch
from minikv_jax.packing import Packing, QuantizedArray


def regions(layer: LayerCache, implementation: str) -> tuple[Any, Any, Any]:
    """Converts a layer to the packed region, the tail and the storage format of an implementation's package.

    The packed region of an unquantised layer has no tokens.

    Raises:
      NotImplementedError: the kernels do not support the layer's quantizer or its sliding window.
    """
    quantizer = layer.method.quantizer
    if layer.spec.window is not None:
        raise NotImplementedError(f"window={layer.spec.window}: the kernels keep no positions for a sliding window")
    if quantizer is not None and not quantizer.kernel_reads:
        raise NotImplementedError(f"{type(quantizer).__name__}: the kernels read min/max codes only")
    k, v = _codes(layer, "keys"), _codes(layer, "values")
    package = dispatch.package(implementation)
    packed = package.Region(_packed(package, k), _packed(package, v), layer.packed.length)
    tail = package.Region(layer.tail.k, layer.tail.v, layer.tail.length)
    return packed, tail, package.Storage(k.packing.bits, v.packing.bits, k.packing.group_size)


def updated(layer: LayerCache, packed: Any, tail: Any) -> LayerCache:
    """Returns the layer with the packed region and the tail that a kernel has updated."""
    return dataclasses.replace(
        layer,
        packed=Region(
            quantized(packed.k, _codes(layer, "keys").packing),
            quantized(packed.v, _codes(layer, "values").packing),
            packed.length,
            layer.packed.positions,
        ),
        tail=Region(tail.k, tail.v, tail.length, layer.tail.positions),
    )


def _codes(layer: LayerCache, kind: Kind) -> QuantizedArray:
    stored = layer.packed.k if kind == "keys" else layer.packed.v
    return stored if isinstance(stored, QuantizedArray) else _no_codes(layer, kind)


def _no_codes(layer: LayerCache, kind: Kind) -> QuantizedArray:
    batch, kv_heads, _, head_dim = layer.tail.k.shape
    packing = Packing(bits=2, group_size=16, axis="tokens" if kind == "keys" else "channels")
    columns = head_dim if kind == "keys" else head_dim // packing.group_size
    metadata = jnp.zeros((batch, kv_heads, 0, columns), jnp.float16)
    words = jnp.zeros((batch, kv_heads, 0, head_dim), jnp.uint32)
    return QuantizedArray((words,), metadata, metadata, None, None, packing)


def _packed(package: Any, x: QuantizedArray) -> Any:
    factors = None if x.scale_factor is None else (x.scale_factor, x.zero_factor)
    return package.Packed(x.planes, x.scale, x.zero, factors)


def quantized(x: Any, packing: Packing) -> QuantizedArray:
    """Converts a package's `Packed` to the library's value."""
    scale_factor, zero_factor = x.factors or (None, None)
    return QuantizedArray(x.planes, x.scale, x.zero, scale_factor, zero_factor, packing)
