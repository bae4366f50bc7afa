"""Contracts shared by several attention ops."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from minikv_jax.arrays import Contract
from minikv_jax.cache.state import LayerCache
from minikv_jax.fields import Accepts

_SCALE = Accepts(float, above=0)


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """Returns the scale of the logits, `H ** -0.5` by default. Raises ValueError unless it is positive and finite."""
    if scale is None:
        return float(head_dim**-0.5)
    return _SCALE.value("scale", scale)


def prompt_contract(function: str, q: Any, k: Any, v: Any, lengths: Any) -> tuple[Array, Array, Array, Array]:
    """Checks the arrays of a prompt's attention: `[B, T, N, H]`, twice `[B, T, K, H]`, and `[B]`.

    Raises:
      ValueError: an array of another shape or dtype, or a length that is not in `0..T`.
    """
    contract = Contract(function)
    q = contract.floating("q", q, "B T N H")
    k, v = (contract.floating(name, x, "B T K H", q.dtype) for name, x in (("k", k), ("v", v)))
    contract.heads()
    return q, k, v, contract.integers("lengths", lengths, "B", 0, contract.sizes["T"])


def layer_contract(function: str, layer: Any) -> Contract:
    """Makes the contract of arrays that go with a layer's cache. Raises ValueError if `layer` is not a LayerCache."""
    if not isinstance(layer, LayerCache):
        raise ValueError(f"{function}: layer is a {type(layer).__name__}: expected a LayerCache")
    batch, kv_heads, _, head_dim = layer.tail.k.shape
    return Contract(function, B=batch, K=kv_heads, H=head_dim)
