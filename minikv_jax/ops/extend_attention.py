"""Extend attention: several new tokens per row attend over a layer's cache and over each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.cache.state import LayerCache
from minikv_jax.meshes import heads_at
from minikv_jax.ops import dispatch
from minikv_jax.ops.decode_attention import attend_cache, query_positions
from minikv_jax.ops.online_softmax import finish, merge, merge_sinks
from minikv_jax.ops.prefill_attention import causal_attention
from minikv_jax.ops.shapes import Scaling, layer_contract, scaling, sinks_by_row


@jax.named_scope("extend_attention")
def extend_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: LayerCache,
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with several new tokens per row: over the cache, and causally over each other in full precision.

    Args:
      q, k, v: queries, keys and values of the new tokens, in the dtype of the cache; they are not yet in `layer`.
      layer: the layer's cache.
      lengths: new tokens per row, in `0..T`.
      positions: the queries' positions; needed only if the layer has a sliding window.
      scale: factor of the logits, positive; `H ** -0.5` by default.
      soft_cap: logits `x` become `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118); by default they stay.
      sink_logits: a learnt logit per query head, which enlarges the softmax's denominator like one more key whose value
        is zero (attention sinks of gpt-oss); none by default.
      implementation: "xla", which is the default and the only one.

    Returns:
      `[B, T, N, H]` in `q`'s dtype, zero in the padding.

    Raises:
      ValueError: an array of another shape or dtype than the cache's, a length or position out of range.
      NotImplementedError: an `implementation` other than "xla".
    """
    contract, dtype = layer_contract("extend_attention", layer), layer.tail.k.dtype
    q = contract.floating("q", q, "B T N H", dtype)
    k, v = (contract.floating(name, x, "B T K H", dtype) for name, x in (("k", k), ("v", v)))
    contract.heads()
    lengths = contract.integers("lengths", lengths, "B", 0, q.shape[1])
    positions = query_positions(contract, positions, layer, "B T")
    spec = layer.spec
    q, k, v = spec.to_basis(q, "keys"), spec.to_basis(k, "keys"), spec.to_basis(v, "values")
    sinks = sinks_by_row(contract, sink_logits)
    arguments = (q, k, v, layer, lengths, positions, sinks, scaling(scale, soft_cap, q.shape[-1]))
    heads = (2, 2, 2, 1, None, None, 1)
    out = dispatch.run(
        "extend_attention", implementation, {}, {"xla": _xla}, *arguments, heads=heads, outputs=heads_at(2)
    )
    return spec.from_basis(out, "values")


def _xla(
    q: Array,
    k: Array,
    v: Array,
    layer: LayerCache,
    lengths: Array,
    positions: Array,
    sinks: Array | None,
    scale: Scaling,
) -> Float[Array, "B T N H"]:
    new = causal_attention(q, k, v, lengths, scale, layer.spec.window, positions[:, :1, None])
    part = merge_sinks(merge(attend_cache(q, layer, positions, scale), new), sinks)
    out = finish(part, q.shape[2] // k.shape[2], q.dtype)
    valid = jnp.arange(q.shape[1]) < lengths[:, None]
    return jnp.where(valid[..., None, None], out, 0)
