"""Decode attention: one query per row over a layer's cache, read as it is stored (MiniKV section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.arrays import INT32_MAX, Contract
from minikv_jax.cache.state import LayerCache
from minikv_jax.models import windows
from minikv_jax.ops import dispatch, kernel_arrays
from minikv_jax.ops.online_softmax import Partial, attend, empty, finish, logits, merge, merge_sinks, split_heads
from minikv_jax.ops.shapes import Scaling, layer_contract, refuse_sinks, scaling, sinks_by_row
from minikv_jax.outline import outlined
from minikv_jax.packing import MAX_BLOCK

BLOCK = MAX_BLOCK  # cached tokens read at a time in plain JAX; a multiple of every packing block

_Attend = Callable[..., Partial]  # to a run of a region's tokens


@jax.named_scope("decode_attention")
def decode_attention(
    q: Float[Array, "B N H"],
    layer: LayerCache,
    positions: Int[Array, "B"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attends with one query per row over all tokens of a layer's cache, read as stored (MiniKV section 3.4).

    Args:
      q: the newest token's queries, in the dtype of the cache. Its key and value are in `layer` already.
      layer: the layer's cache.
      positions: the queries' positions; needed only if the layer has a sliding window.
      scale: factor of the logits, positive; `H ** -0.5` by default.
      soft_cap: logits `x` become `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118); by default they stay.
        Only "xla" computes it.
      sink_logits: a learnt logit per query head, which enlarges the softmax's denominator like one more key whose value
        is zero (attention sinks of gpt-oss); none by default. Computed by "xla" only.
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU that supports the inputs.

    Returns:
      `[B, N, H]` in `q`'s dtype; zero for a row whose cache is empty.

    Raises:
      ValueError: queries of another shape or dtype than the cache's, a position or scale out of range.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    contract, q = _query_contract("decode_attention", q, layer)
    positions = query_positions(contract, positions, layer, "B")
    sinks = sinks_by_row(contract, sink_logits)
    batch, heads, head_dim = q.shape
    quantizer = layer.method.quantizer
    sizes = {"batch": batch, "tokens": layer.packed.capacity + layer.tail.capacity, "heads": heads}
    sizes |= {"kv_heads": layer.tail.k.shape[1], "head_dim": head_dim, "bits": quantizer.k_bits if quantizer else 16}
    arguments = (layer.spec.to_basis(q, "keys"), layer, positions, sinks, scaling(scale, soft_cap, head_dim))
    heads = (1, 1, None, 1)
    out = dispatch.run("decode_attention", implementation, sizes, _IMPLEMENTATIONS, *arguments, heads=heads)
    return layer.spec.from_basis(out, "values")


def _query_contract(function: str, q: Any, layer: LayerCache) -> tuple[Contract, Array]:
    contract = layer_contract(function, layer)
    q = contract.floating("q", q, "B N H", layer.tail.k.dtype)
    contract.heads()
    return contract, q


def query_positions(contract: Contract, positions: Array | None, layer: LayerCache, legend: str) -> Array:
    """Checks the queries' positions. Returns zeros if none are given and none are needed."""
    if positions is not None:
        return contract.integers("positions", positions, legend, 0, INT32_MAX)
    if layer.spec.window is not None:
        raise ValueError(
            f"positions=None: a layer with a sliding window ({layer.spec.window}) needs the queries' positions"
        )
    return jnp.zeros([contract.sizes[letter] for letter in legend.split()], jnp.int32)


def _xla(q: Array, layer: LayerCache, positions: Array, sinks: Array | None, scale: Scaling) -> Array:
    part = merge_sinks(attend_cache(q[:, None], layer, positions[:, None], scale), sinks)
    return finish(part, q.shape[1] // layer.tail.k.shape[1], q.dtype)[:, 0]


def attend_cache(
    q: Float[Array, "B T N H"], layer: LayerCache, positions: Int[Array, "B T"], scale: Scaling
) -> Partial:
    """Attends with new queries over a layer's whole cache. The result has queries group-major (`Q = G * T`).

    `positions` are the queries' own and matter only with a sliding window.
    """
    grouped = split_heads(q, layer.tail.k.shape[1])
    batch, kv_heads, group, _, dim = grouped.shape
    q = grouped.reshape(batch, kv_heads, -1, dim)
    oldest = None
    if layer.spec.window is not None:
        oldest = jnp.tile(windows.oldest(layer.spec.window, positions), (1, group))[:, None, :, None]

    def region(
        part: Partial, attend_run: _Attend, capacity: int, length: Array, key_positions: Array | None
    ) -> Partial:
        """Adds a region's tokens block by block, reading no block past the longest row."""
        size = min(BLOCK, capacity)

        def block(i: Array | int, part: Partial) -> Partial:
            # The last block is moved back to end with the region. Tokens that it repeats are masked.
            first = jnp.minimum(i * size, capacity - size)
            slots = first + jnp.arange(size)
            seen = ((slots >= i * size) & (slots < length[:, None]))[:, None, None]  # [B, 1, 1, S]
            if oldest is not None and key_positions is not None:
                seen &= lax.dynamic_slice_in_dim(key_positions, first, size, axis=2)[:, :, None] >= oldest
            return merge(part, attend_run(q, layer, first, seen, scale=scale, size=size))

        if size == capacity:
            return block(0, part)
        return lax.fori_loop(0, (jnp.max(length) + size - 1) // size, block, part)

    part = empty(batch, kv_heads, q.shape[2], dim)
    part = region(part, _attend_tail, layer.tail.capacity, layer.tail.length, layer.tail.positions)
    if layer.packed.capacity:
        part = region(part, _attend_packed, layer.packed.capacity, layer.packed.length, layer.packed.positions)
    return part


@outlined("scale", "size")
@jax.named_scope("decode_attention")
def _attend_tail(q: Array, layer: LayerCache, first: Array, seen: Array, *, scale: Scaling, size: int) -> Partial:
    k, v = (lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (layer.tail.k, layer.tail.v))
    return attend(q, k, v, seen, scale)


@outlined("scale", "size")
@jax.named_scope("decode_attention")
def _attend_packed(q: Array, layer: LayerCache, first: Array, seen: Array, *, scale: Scaling, size: int) -> Partial:
    return attend(q, *layer.packed_tokens(first, size, q.dtype), seen, scale)


def _pallas(q: Array, layer: LayerCache, positions: Array, sinks: Array | None, scale: Scaling) -> Array:
    refuse_sinks("decode_attention", "pallas", sinks)
    del positions  # no kernel supports a window
    factor = scale.without_soft_cap("decode_attention", "pallas")
    packed, tail, storage = kernel_arrays.regions(layer, "pallas")
    return dispatch.package("pallas").decode_attention(q, packed, tail, storage=storage, scale=factor)


def _cuda(q: Array, layer: LayerCache, positions: Array, sinks: Array | None, scale: Scaling) -> Array:
    refuse_sinks("decode_attention", "cuda", sinks)
    del positions
    factor = scale.without_soft_cap("decode_attention", "cuda")
    packed, tail, storage = kernel_arrays.regions(layer, "cuda")
    if layer.method.quantizer is None:
        return dispatch.package("cuda").decode_unpacked(q, tail, scale=factor)  # cuDNN's
    return dispatch.package("cuda").decode_attention(q, packed, tail, storage=storage, scale=factor)


_IMPLEMENTATIONS = {"xla": _xla, "pallas": _pallas, "cuda": _cuda}


@jax.named_scope("decode_attention")
def decode_attention_weights(
    q: Float[Array, "B N H"],
    layer: LayerCache,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K C"]]:
    """Runs `decode_attention` over a full-precision cache. Also returns the attention weight of each tail slot.

    Weights are float32, summed over the `G` query heads of a KV head, and zero in empty slots.

    Raises:
      ValueError: queries of another shape or dtype than the cache's, a quantised cache or one with a sliding window.
      NotImplementedError: an `implementation` other than "xla".
    """
    contract, q = _query_contract("decode_attention_weights", q, layer)
    if layer.method.quantizer is not None or layer.spec.window is not None:
        raise ValueError(
            f"quantizer={layer.method.quantizer}, window={layer.spec.window}: weights are of full-precision tails only"
        )
    arguments = (q, layer, sinks_by_row(contract, sink_logits), scaling(scale, soft_cap, q.shape[-1]))
    implementations = {"xla": _xla_weights}
    return dispatch.run("decode_attention_weights", implementation, {}, implementations, *arguments, heads=(1, 1, 1))


def _xla_weights(q: Array, layer: LayerCache, sinks: Array | None, scale: Scaling) -> tuple[Array, Array]:
    kv_heads = layer.tail.k.shape[1]
    part = merge_sinks(attend_cache(q[:, None], layer, jnp.zeros((q.shape[0], 1), jnp.int32), scale), sinks)
    seen = (jnp.arange(layer.tail.capacity) < layer.tail.length[:, None])[:, None, None]  # [B, 1, 1, C]
    masked = logits(split_heads(q[:, None], kv_heads)[:, :, :, 0], layer.tail.k, seen, scale)
    top, total = (jnp.where(part.total > 0, x, 1.0)[..., None] for x in (part.top, part.total))
    weights = jnp.sum(jnp.exp(masked - top) / total, axis=2)
    return finish(part, q.shape[1] // kv_heads, q.dtype)[:, 0], weights
