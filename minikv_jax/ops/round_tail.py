"""Round tail: quantises keys and values of the tail when KIVI does, although they are packed later.

KIVI's code (https://github.com/jy-yuan/KIVI) quantises keys in whole runs of `tail.length` and values one by one, as
they leave the newest `tail.length`. A layer packs the key and the value of a token together. In between, the tail holds
what their codes decode to, so attention reads the same numbers as in KIVI, but for one value: KIVI quantises a value
after its own step's attention, and here it is quantised before.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from minikv_jax.cache.state import LayerCache
from minikv_jax.methods.base import Kind


def tokens_after_sinks(layer: LayerCache) -> Int[Array, "B"]:
    """Number of tokens that a layer holds besides the sinks; negative if it lacks some of these."""
    return layer.tokens - layer.method.sinks


def round_tail(layer: LayerCache, before: Int[Array, "B"], after: Int[Array, "B"]) -> LayerCache:
    """Quantises and dequantises the keys and values of the tail that become due, in the "kivi" rule of `Tail`.

    Args:
      layer: the layer's cache.
      before: tokens after the sinks when it was last rounded, 0 for never.
      after: tokens after the sinks that the next query sees. The due ones of them are in the tail or packed.
    """
    method, tail = layer.method, layer.tail
    if method.quantizer is None or method.tail.rule != "kivi":
        return layer
    length = method.tail.length
    positions = layer.packed.length[:, None] + jnp.arange(length)  # of the tail's slots after the sinks

    def due(first: Array, end: Array) -> Bool[Array, "B S"]:
        return (positions >= first[:, None]) & (positions < end[:, None])

    # The key that fills a run is quantised once its own query has read it.
    keys = due((before - 1) // length * length, (after - 1) // length * length)
    values = due(before - length, after - length)[:, : method.flush_block]  # no others are in the tail
    turns = jnp.any(keys).astype(jnp.int32)  # a loop of zero or one iterations, because XLA updates its carry in place
    k = lax.fori_loop(0, turns, lambda _, k: _rounded(layer, k, keys, "keys"), tail.k)
    return dataclasses.replace(layer, tail=dataclasses.replace(tail, k=k, v=_rounded(layer, tail.v, values, "values")))


def _rounded(layer: LayerCache, x: Array, due: Bool[Array, "B S"], kind: Kind) -> Array:
    """Rounds the tokens of the tail `x` that are due to what their codes decode to."""
    sinks = layer.method.sinks
    old = x[:, :, sinks : sinks + due.shape[1]]
    new = layer.spec.decode(layer.spec.encode(old, kind), kind, x.dtype)
    return lax.dynamic_update_slice_in_dim(x, jnp.where(due[:, None, :, None], new, old), sinks, axis=2)
