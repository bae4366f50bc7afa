"""Refit: lets a method change the values of the kept prompt tokens before they are stored (`methods.base.Refit`)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache
from minikv_jax.methods import calls
from minikv_jax.methods.base import KeptTokens, LayerInputs
from minikv_jax.ops.compress import compress
from minikv_jax.ops.select import Kept


def refit(
    inputs: LayerInputs,
    lengths: Int[Array, "B"],
    kept: Kept,
    capacity: LayerCapacity,
    spec: LayerSpec,
    implementation: str | None = None,
) -> Float[Array, "B T K H"]:
    """Refits the values of the kept tokens.

    Args:
      inputs: the prompt, with what was drafted or repeated after it.
      lengths: tokens of the prompt per row.
      kept: the tokens that stay.
      capacity: static sizes of the cache.
      spec: the method, and the layer's window and number.
      implementation: implementation of `quantize`, as `compress` will use it.

    Returns:
      The prompt's values, those of the kept tokens replaced, in their dtype.
    """
    k, v, change = inputs.k, inputs.v, spec.method.refit
    assert change is not None
    rows, heads = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]
    source = jnp.minimum(kept.positions, k.shape[1] - 1)
    values = v.at[rows, source, heads].get(mode="promise_in_bounds")  # [B, K, M, H]
    valid = jnp.arange(values.shape[2]) < kept.tokens[:, None, None]
    values = jnp.where(valid[..., None], values.astype(jnp.float32), 0.0)
    keys = _as_read(compress(k, v, kept, capacity, spec, None, implementation), values.shape[2])
    new = calls.refit(change, inputs, KeptTokens(keys, values, kept.positions, lengths)).astype(v.dtype)
    return v.at[rows, kept.positions, heads].set(new, mode="drop")  # filler slots point past the end


def _as_read(layer: LayerCache, slots: int) -> Float[Array, "B K M H"]:
    """Returns a layer's keys as decoding reads them: the sinks, the packed tokens, the rest of the tail."""
    spec, packed = layer.spec, layer.packed.length[:, None]
    tail = spec.from_basis(layer.tail.k.astype(jnp.float32), "keys")
    slot = jnp.broadcast_to(jnp.arange(slots), (packed.shape[0], slots))
    in_front = slot < spec.method.sinks
    keys = _take(tail, jnp.where(in_front, slot, slot - packed))
    if layer.packed.capacity == 0:
        return keys
    old = spec.from_basis(layer.packed_tokens(0, layer.packed.capacity, jnp.float32)[0], "keys")
    is_packed = ~in_front & (slot < spec.method.sinks + packed)
    return jnp.where(is_packed[:, None, :, None], _take(old, slot - spec.method.sinks), keys)


def _take(x: Float[Array, "B K S H"], slots: Int[Array, "B M"]) -> Float[Array, "B K M H"]:
    return jnp.take_along_axis(x, jnp.clip(slots, 0, x.shape[2] - 1)[:, None, :, None], axis=2)
