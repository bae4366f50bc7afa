"""Contracts shared by several attention ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minikv_jax import checks
from minikv_jax.arrays import Contract, known
from minikv_jax.cache.state import LayerCache
from minikv_jax.fields import Accepts
from minikv_jax.methods.base import LayerInputs
from minikv_jax.models import windows

_SCALE = Accepts(float, above=0)


class Scaling(NamedTuple):
    """Turns products of queries and keys into attention logits.

    Attributes:
      factor: factor of the products.
      soft_cap: logits `x` become `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118); None: they stay.
    """

    factor: float
    soft_cap: float | None = None

    def logits(self, products: Array) -> Array:
        scaled = products * self.factor
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def without_soft_cap(self, op: str, implementation: str) -> float:
        """Returns the factor for a kernel without soft caps. Raises NotImplementedError if there is one."""
        if self.soft_cap is not None:
            raise NotImplementedError(
                f"{op}: soft_cap={self.soft_cap} is computed by implementation='xla' only, not by {implementation!r}"
            )
        return self.factor


def scaling(scale: float | None, soft_cap: float | None, head_dim: int) -> Scaling:
    """Returns how products become logits. Raises ValueError for a scale or cap that is not positive and finite."""
    return Scaling(softmax_scale(scale, head_dim), soft_cap_value(soft_cap))


def soft_cap_value(soft_cap: float | None) -> float | None:
    """Returns the soft cap, or None. Raises ValueError unless it is positive and finite."""
    return None if soft_cap is None else _SCALE.value("soft_cap", soft_cap)


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """Returns the scale of the logits, `H ** -0.5` by default. Raises ValueError unless it is positive and finite."""
    if scale is None:
        return float(head_dim**-0.5)
    return _SCALE.value("scale", scale)


def prompt_contract(
    function: str, q: Any, k: Any, v: Any, lengths: Any, sink_logits: Any = None
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Checks the arrays of a prompt's attention: `[B, T, N, H]`, twice `[B, T, K, H]`, `[B]`, and `[N]` or None.

    Returns:
      The arrays, the last one repeated for every row.

    Raises:
      ValueError: an array of another shape or dtype, or a length that is not in `0..T`.
    """
    contract = Contract(function)
    q = contract.floating("q", q, "B T N H")
    k, v = (contract.floating(name, x, "B T K H", q.dtype) for name, x in (("k", k), ("v", v)))
    contract.heads()
    lengths = contract.integers("lengths", lengths, "B", 0, contract.sizes["T"])
    return q, k, v, lengths, sinks_by_row(contract, sink_logits)


def inputs_contract(function: str, inputs: LayerInputs, num_layers: int) -> LayerInputs:
    """Checks the arrays and numbers of one layer's prompt.

    Returns:
      The inputs without column sums and votes.

    Raises:
      ValueError: anything but `LayerInputs`, an array of another shape or dtype, or a number out of range. The message
        names the first that is wrong.
    """
    if not isinstance(inputs, LayerInputs):
        raise ValueError(f"{function}: inputs is a {type(inputs).__name__}: expected a LayerInputs")
    q, k, v, lengths, _ = prompt_contract(function, *inputs[:4], inputs.sink_logits)
    batch, _, heads, dim = q.shape
    contract = Contract(function, B=batch, F=dim // 2, NH=heads * dim)
    frequencies, projection = inputs.frequencies, inputs.output_projection
    if frequencies is not None:
        legend = "B F" if getattr(frequencies, "ndim", 1) == 2 else "F"
        frequencies = contract.floating("frequencies", frequencies, legend, "float32")
    if projection is not None:
        projection = contract.floating("output_projection", projection, "NH D")
    more: dict[str, Any] = {"soft_cap": soft_cap_value(inputs.soft_cap), "sink_logits": inputs.sink_logits}
    windows.check(inputs.window)
    layer: Any = inputs.layer
    if isinstance(layer, jax.Array) and layer.ndim == 0 and known(layer) is not None:
        layer = layer.item()
    layer = checks.integer("layer", layer, 0, checks.integer("num_layers", num_layers, 1) - 1)
    more |= {"output_projection": projection}
    return LayerInputs(q, k, v, lengths, None, inputs.window, layer, frequencies, **more)


def sinks_by_row(contract: Contract, sink_logits: Any) -> Array | None:
    """Checks the sink logits `[N]` and repeats them for every row, as meshes split arrays by rows and heads.

    Raises:
      ValueError: another shape or dtype.
    """
    if sink_logits is None:
        return None
    sink_logits = contract.floating("sink_logits", sink_logits, "N")
    return jnp.broadcast_to(sink_logits, (contract.sizes["B"], contract.sizes["N"]))


def refuse_sinks(op: str, implementation: str, sink_logits: Array | None) -> None:
    """Raises NotImplementedError if there are attention sinks, for implementations that do not compute them."""
    if sink_logits is not None:
        raise NotImplementedError(
            f"{op}: sink_logits are computed by implementation='xla' only, not by {implementation!r}"
        )


def layer_contract(function: str, layer: Any) -> Contract:
    """Makes the contract of arrays that go with a layer's cache. Raises ValueError if `layer` is not a LayerCache."""
    if not isinstance(layer, LayerCache):
        raise ValueError(f"{function}: layer is a {type(layer).__name__}: expected a LayerCache")
    batch, kv_heads, _, head_dim = layer.tail.k.shape
    return Contract(function, B=batch, K=kv_heads, H=head_dim)
