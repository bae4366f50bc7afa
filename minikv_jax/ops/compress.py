"""Compress: makes a layer's cache from the kept prompt tokens (MiniKV section 3.3)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import Eviction, LayerCache, Region, empty_region
from minikv_jax.methods.method import Method
from minikv_jax.ops.quantize import store
from minikv_jax.ops.round_tail import round_tail, tokens_after_sinks
from minikv_jax.ops.select import Kept


def compress(
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kept: Kept,
    capacity: LayerCapacity,
    spec: LayerSpec,
    eviction: Eviction | None = None,
    implementation: str | None = None,
) -> LayerCache:
    """Makes a layer's cache from the kept prompt tokens.

    The oldest tokens after the sinks are packed, as many as fill whole packing blocks. The others form the tail, which
    under the "kivi" rule includes the newest `tail.length` tokens (`round_tail` quantises some of them).

    Args:
      k, v: the prompt's keys (after RoPE) and values.
      kept: the tokens that stay, at most `capacity.kept` per row.
      capacity: static sizes of the cache.
      spec: the method, and the layer's window and number.
      eviction: state of a layer that evicts (`start_eviction`).
      implementation: implementation of `quantize`.
    """
    tokens, positions = k.shape[1], kept.positions
    # Filler slots point past the end. They read the last token instead, so that they are finite if the prompt is.
    source = jnp.minimum(positions, tokens - 1)
    rows, heads = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]
    # One gather, and no transposed copy of the prompt.
    kept_k, kept_v = (x.at[rows, source, heads].get(mode="promise_in_bounds") for x in (k, v))  # [B, K, M, H]
    if spec.method.quantizer is None:
        tail = _tail_of_all(kept_k, kept_v, kept, capacity, spec)
        return LayerCache(empty_region(kept.tokens), tail, eviction, spec)
    packed, tail = _split(spec.to_basis(kept_k, "keys"), spec.to_basis(kept_v, "values"), kept, capacity, spec)
    stored_k = store(packed.k, "keys", spec, implementation).pad_tokens(capacity.packed)
    stored_v = store(packed.v, "values", spec, implementation).pad_tokens(capacity.packed)
    layer = LayerCache(Region(stored_k, stored_v, packed.length, packed.positions), tail, eviction, spec)
    return round_tail(layer, jnp.zeros_like(kept.tokens), tokens_after_sinks(layer))


def _tail_of_all(k: Array, v: Array, kept: Kept, capacity: LayerCapacity, spec: LayerSpec) -> Region[Array]:
    """Makes a tail of all kept tokens, with room for new ones."""
    room = capacity.tail - kept.positions.shape[-1]
    k, v, positions = (
        jnp.pad(x, [(0, 0), (0, 0), (0, room)] + [(0, 0)] * (x.ndim - 3)) for x in (k, v, kept.positions)
    )
    return Region(k, v, kept.tokens, None if spec.window is None else positions)


def _split(
    k: Array, v: Array, kept: Kept, capacity: LayerCapacity, spec: LayerSpec
) -> tuple[Region[Array], Region[Array]]:
    """Splits the kept tokens into those to pack and the tail."""
    method, positions = spec.method, kept.positions
    assert method.quantizer is not None
    beyond = jnp.maximum(kept.tokens - method.sinks - method.tail_keep, 0)
    packed_length = beyond // method.quantizer.block * method.quantizer.block
    slots = jnp.arange(capacity.tail)
    slots = slots + jnp.where(slots < method.sinks, 0, packed_length[:, None])  # [B, C]
    slots = jnp.minimum(slots, positions.shape[-1] - 1)[:, None]
    packed_positions = tail_positions = None
    if spec.window is not None:
        packed_positions = _pad_to(_packed_part(positions, method, capacity), capacity.packed)
        tail_positions = jnp.take_along_axis(positions, slots, axis=2)
    return (
        Region(_packed_part(k, method, capacity), _packed_part(v, method, capacity), packed_length, packed_positions),
        Region(
            jnp.take_along_axis(k, slots[..., None], axis=2),
            jnp.take_along_axis(v, slots[..., None], axis=2),
            kept.tokens - packed_length,
            tail_positions,
        ),
    )


def _packed_part(x: Num[Array, "B K M ..."], method: Method, capacity: LayerCapacity) -> Array:
    """Cuts or pads the kept tokens after the sinks to whole packing blocks."""
    assert method.quantizer is not None
    block = method.quantizer.block
    available = max(x.shape[2] - method.sinks - method.tail_keep, 0)
    size = min(max(available // block * block, block), capacity.packed)
    return _pad_to(x[:, :, method.sinks : method.sinks + size], size)


def _pad_to(x: Num[Array, "B K M ..."], size: int) -> Array:
    widths = [(0, 0), (0, 0), (0, size - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, widths, mode="edge" if x.shape[2] else "constant")


def start_eviction(
    scores: Float[Array, "B K T"],
    kept: Kept,
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    method: Method,
    capacity: LayerCapacity,
) -> Eviction | None:
    """Makes the eviction state after a prompt: scores of the kept tokens, and budgets. None without `evict_every`.

    Args:
      scores: scores of the prompt's tokens.
      kept: the tokens that stay.
      lengths: valid tokens per row.
      heavy: the layer's budget per row. A count may exceed the prompt; the row then grows up to it.
      method: the method, which sets the recent budget.
      capacity: static sizes of the cache.
    """
    if method.evict_every is None:
        return None
    recent = method.recent.granted(lengths)
    if not method.heavy:
        return Eviction(None, heavy, recent)
    tokens = scores.shape[-1]
    slots = jnp.take_along_axis(scores, jnp.minimum(kept.positions, tokens - 1), axis=-1)
    slots = jnp.where(kept.positions < tokens, slots, 0.0)
    return Eviction(jnp.pad(slots, [(0, 0), (0, 0), (0, capacity.tail - slots.shape[-1])]), heavy, recent)
