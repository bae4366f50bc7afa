"""Append: puts new tokens into the tail, and packs the oldest block of a full tail (MiniKV section 3.3)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.arrays import INT32_MAX
from minikv_jax.cache.state import LayerCache, Region
from minikv_jax.meshes import call_split, specs
from minikv_jax.ops import dispatch, kernel_arrays
from minikv_jax.ops.quantize import store
from minikv_jax.ops.round_tail import round_tail, tokens_after_sinks
from minikv_jax.ops.shapes import layer_contract


@jax.named_scope("append")
def append(
    layer: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"],
    implementation: str | None = None,
) -> LayerCache:
    """Adds new tokens to each row's tail and packs full tails (MiniKV section 3.3, KIVI algorithm 1).

    There must be room (`LayerCache.room`). Under `jit`, a token without room is dropped and the cache keeps its other
    tokens; `debug_checks` reports it.

    Args:
      layer: the layer's cache.
      k, v: keys (after RoPE) and values, in the dtype of the cache.
      lengths: new tokens per row, in `0..T`; row `b` takes its first `lengths[b]` tokens.
      positions: the new tokens' positions, stored if the layer has a sliding window.
      implementation: "xla", "pallas" or "cuda"; by default the fastest recorded for this GPU that supports the inputs.

    Returns:
      The layer's new cache.

    Raises:
      ValueError: an array of another shape or dtype than the cache's, a length or position out of range, a row without
        room.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    dispatch.check_implementation(implementation)
    contract, dtype = layer_contract("append", layer), layer.tail.k.dtype
    k, v = (contract.floating(name, x, "B T K H", dtype) for name, x in (("k", k), ("v", v)))
    lengths = contract.integers("lengths", lengths, "B", 0, k.shape[1])
    positions = contract.integers("positions", positions, "B T", 0, INT32_MAX)
    room = layer.free() if layer.eviction is not None else layer.room()
    contract.holds(lengths <= room, "gets {tokens} tokens and has room for {room}", tokens=lengths, room=room)
    k, v = layer.spec.to_basis(k, "keys"), layer.spec.to_basis(v, "values")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    arguments = (layer, k, v, lengths, positions)
    return call_split(
        functools.partial(_append, implementation=implementation), arguments, (1, 1, 1, None, None), specs(layer, 1)
    )


def _append(
    layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array, implementation: str | None
) -> LayerCache:
    if layer.method.quantizer is None:
        return _append_once(layer, k, v, lengths, positions, implementation)
    if k.shape[2] == 1:
        held = tokens_after_sinks(layer)
        layer = round_tail(layer, held, held + jnp.minimum(lengths, layer.room()))
        sizes = {"batch": k.shape[0], "kv_heads": k.shape[1], "head_dim": k.shape[3]}
        arguments = (layer, k, v, lengths, positions)
        heads = (1, 1, 1, None, None)
        return dispatch.run("append", implementation, sizes, _IMPLEMENTATIONS, *arguments, heads=heads)

    def step(state: tuple[LayerCache, Array]) -> tuple[LayerCache, Array]:
        layer, done = state
        count = jnp.minimum(lengths - done, layer.free())
        held, admitted = tokens_after_sinks(layer), jnp.minimum(count, layer.room())
        layer = round_tail(_write_tail(layer, k, v, positions, done, count), held, held + admitted)
        return _flush(layer, implementation), done + count

    def goes_on(state: tuple[LayerCache, Array]) -> Array:
        layer, done = state
        # A tail is full here only if nothing of it can be packed. The remaining tokens are dropped.
        return jnp.any((done < lengths) & (layer.free() > 0))

    return lax.while_loop(goes_on, step, (layer, jnp.zeros_like(lengths)))[0]


def _append_once(
    layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array, implementation: str | None
) -> LayerCache:
    """Adds tokens that fit into the tail and drops the others."""
    layer = _write_tail(layer, k, v, positions, jnp.zeros_like(lengths), jnp.minimum(lengths, layer.free()))
    return _flush(layer, implementation)


def _xla(layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array) -> LayerCache:
    return _append_once(layer, k, v, lengths, positions, "xla")


def _pallas(layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array) -> LayerCache:
    return _append_once(layer, k, v, lengths, positions, "pallas")  # plain JAX writes the tail, the Pallas kernel packs


def _cuda(layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array) -> LayerCache:
    """Adds one token per row in place and packs full tails in the same call."""
    del positions  # no kernel supports a window
    quantizer = layer.method.quantizer
    if quantizer is None or not quantizer.kernel_packs:
        raise NotImplementedError(f"append: the CUDA kernel packs by min/max, not {type(quantizer).__name__}")
    packed, tail, storage = kernel_arrays.regions(layer, "cuda")
    packed, tail = dispatch.package("cuda").append(
        k[:, :, 0],
        v[:, :, 0],
        lengths,
        packed,
        tail,
        storage=storage,
        sinks=layer.method.sinks,
        block=layer.method.flush_block,
    )
    return kernel_arrays.updated(layer, packed, tail)


_IMPLEMENTATIONS = {"xla": _xla, "pallas": _pallas, "cuda": _cuda}


def _write_tail(layer: LayerCache, k: Array, v: Array, positions: Array, first: Array, count: Array) -> LayerCache:
    """Writes tokens `first[b] .. first[b] + count[b] - 1` of each row to the end of its tail."""
    tail = layer.tail
    put = functools.partial(_put_tokens, slot=tail.length, first=first, count=count)
    tail_positions = tail.positions
    if tail_positions is not None:
        tail_positions = put(tail_positions, jnp.broadcast_to(positions[:, None], k.shape[:3]))
    return dataclasses.replace(layer, tail=Region(put(tail.k, k), put(tail.v, v), tail.length + count, tail_positions))


def _put_tokens(tail: Array, new: Array, slot: Array, first: Array, count: Array) -> Array:
    """Writes `count[b]` of a row's new tokens, from `first[b]` on, to its tail from `slot[b]` on."""
    offset = jnp.arange(new.shape[2]) - first[:, None]
    chosen = (offset >= 0) & (offset < count[:, None])
    slots = jnp.where(chosen, slot[:, None] + offset, tail.shape[2])  # out of range: dropped
    return tail.at[jnp.arange(tail.shape[0])[:, None], :, slots].set(new.swapaxes(1, 2), mode="drop")


def _flush(layer: LayerCache, implementation: str | None) -> LayerCache:
    """Packs the oldest block of every tail that is full (MiniKV section 3.3, KIVI algorithm 1)."""
    if layer.packed.capacity < layer.method.flush_block:  # not quantised, or made for too few tokens to fill a tail
        return layer
    # A tail stays full if there is no room for its block: packed tokens are never overwritten.
    has_room = layer.packed.length + layer.method.flush_block <= layer.packed.capacity
    full = (layer.free() == 0) & has_room
    # A loop of zero or one iterations instead of `cond`, because XLA updates a loop's carry in place.
    turns = jnp.any(full).astype(jnp.int32)
    return lax.fori_loop(0, turns, lambda _, layer: _pack_block(layer, full, implementation), layer)


def _pack_block(layer: LayerCache, full: Array, implementation: str | None) -> LayerCache:
    """Moves the oldest block of the full rows' tails to their packed regions."""
    method, packed, tail = layer.method, layer.packed, layer.tail
    block, oldest = method.flush_block, slice(method.sinks, method.sinks + method.flush_block)
    k = store(tail.k[:, :, oldest], "keys", layer.spec, implementation)
    v = store(tail.v[:, :, oldest], "values", layer.spec, implementation)
    moved = jnp.where(full, block, 0)
    packed_positions, tail_positions = packed.positions, tail.positions
    if packed_positions is not None and tail_positions is not None:
        slots = jnp.where(full[:, None], packed.length[:, None] + jnp.arange(block), packed.capacity)
        rows = jnp.arange(full.shape[0])[:, None]
        oldest_positions = tail_positions[:, :, oldest].swapaxes(1, 2)
        packed_positions = packed_positions.at[rows, :, slots].set(oldest_positions, mode="drop")
        tail_positions = _shift(tail_positions, layer, full)
    return dataclasses.replace(
        layer,
        packed=Region(
            packed.k.write(k, packed.length, full),
            packed.v.write(v, packed.length, full),
            packed.length + moved,
            packed_positions,
        ),
        tail=Region(_shift(tail.k, layer, full), _shift(tail.v, layer, full), tail.length - moved, tail_positions),
    )


def _shift(x: Array, layer: LayerCache, full: Array) -> Array:
    """Removes the oldest block from the tails of full rows: the tokens after it move down."""
    method = layer.method
    if not method.tail_keep:
        return x
    sinks, block = method.sinks, method.flush_block
    kept, moved = x[:, :, sinks : sinks + method.tail_keep], x[:, :, sinks + block :]
    chosen = full.reshape(-1, *[1] * (x.ndim - 1))
    return lax.dynamic_update_slice_in_dim(x, jnp.where(chosen, moved, kept), sinks, axis=2)
