"""The KV cache as a value: frozen pytrees with static capacities and true lengths per row.

A layer keeps two regions (`docs/architecture.md`, "A layer's cache"): packed codes, and a full-precision tail whose
first slots are the sinks. `compress` makes a layer from a prompt, `append` adds tokens and packs a full tail; both
are pure and update in place inside a compiled loop. Capacities are functions of the method and the sizes
(`layer_capacity`), so that the bytes of a cache are known before it exists.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from minikv_jax.methods import quantizers
from minikv_jax.methods.base import Kind, Operand
from minikv_jax.methods.config import CacheConfig
from minikv_jax.methods.quantizers import Packed
from minikv_jax.ops import dispatch as kernels
from minikv_jax.ops.evict import Eviction, most_tokens
from minikv_jax.ops.select import Kept, kept_capacity


def _static(**default: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **default)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values: `P` packed tokens and `C` tail slots per row and KV head.

    Attributes:
      k, v: packed tokens, leading axes `[B, K]`; None where the method does not quantise.
      tail_k, tail_v: full-precision tokens in the model's dtype: sinks first, then the newest. Under a quantiser that
        rotates, these too are rotated.
      packed_length, tail_length: valid tokens per row. What lies beyond them is garbage.
      packed_positions, tail_positions: original positions, kept only for layers with a sliding window.
      number: the layer's number in the model.
      eviction: under `evict_every`, what decides which tokens leave the tail.
    """

    k: Packed | None
    v: Packed | None
    tail_k: Float[Array, "B K C H"]
    tail_v: Float[Array, "B K C H"]
    packed_length: Int[Array, "B"]
    tail_length: Int[Array, "B"]
    packed_positions: Int[Array, "B K P"] | None
    tail_positions: Int[Array, "B K C"] | None
    config: CacheConfig = _static()
    window: int | None = _static()
    number: int = _static(default=0)
    eviction: Eviction | None = None

    def operand(self, kind: Kind) -> Operand:
        """What its quantiser is told about the keys or the values."""
        return Operand(kind, self.number, self.config)

    def rotate(self, x: Float[Array, "*lead H"], kind: Kind, *, back: bool = False) -> Float[Array, "*lead H"]:
        """Turns keys or queries ("keys"), or values ("values"), into the basis of the cache; outputs go `back`."""
        return quantizers.rotate(x, self.operand(kind), back=back)

    def packed_tokens(self, start: Array | int, size: int, dtype: DTypeLike) -> tuple[Array, Array]:
        """Keys and values `[B, K, size, H]` of packed tokens, dequantised."""
        assert self.k is not None and self.v is not None
        k = quantizers.dequantize(self.k.tokens(start, size), self.operand("keys"), dtype)
        return k, quantizers.dequantize(self.v.tokens(start, size), self.operand("values"), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return 0 if self.k is None or self.v is None else self.k.nbytes + self.v.nbytes

    @property
    def packed_capacity(self) -> int:
        """`P`, tokens."""
        return 0 if self.k is None else self.k.num_tokens

    @property
    def tail_capacity(self) -> int:
        """`C`, tokens."""
        return self.tail_k.shape[2]

    @property
    def tokens(self) -> Int[Array, "B"]:
        """Tokens held per row."""
        return self.packed_length + self.tail_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers' caches. `length[b]` counts every token that row `b` has seen: the next token's position."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the lengths included; equal to `memory.report(...).bytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points of all layers (the count that MiniKV's paper gives)."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def kept_tokens(self) -> Int[Array, "L B"]:
        """Tokens held per layer and row."""
        return jnp.stack([layer.tokens for layer in self.layers])

    def room(self) -> int:
        """Tokens that can still be appended to every row; no limit where rows are cut back.

        Reads the lengths: not for use under `jit`.
        """
        return min(int(_room(layer).min()) for layer in self.layers)

    def grow(self, tokens: int) -> KVCache:
        """The same cache with room for `tokens` more."""
        return dataclasses.replace(self, layers=tuple(_grow(layer, tokens) for layer in self.layers))

    def select_rows(self, rows: Int[Array, "R"]) -> KVCache:
        """The cache of rows `rows`, which may repeat or reorder them (beam search, forks of a shared prefix)."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), self)

    def tile(self, times: int) -> KVCache:
        """Each row `times` times over: row `b` becomes rows `b * times .. (b + 1) * times - 1`."""
        return self.select_rows(jnp.repeat(jnp.arange(self.length.shape[0]), times))


class LayerCapacity(NamedTuple):
    """Static sizes of a layer's cache, in tokens."""

    kept: int  # prompt tokens, sinks included
    packed: int
    tail: int


def layer_capacity(
    config: CacheConfig, heavy: float | int, prompt_tokens: int, max_new_tokens: int, window: int | None = None
) -> LayerCapacity:
    """Capacities of a layer with the heavy budget `heavy` for prompts of at most `prompt_tokens`."""
    kept = kept_capacity(config, heavy, prompt_tokens, window)
    if not config.quantized:
        tail = max(kept, config.sinks) + max_new_tokens
        return LayerCapacity(
            kept, 0, min(tail, most_tokens(config, heavy, prompt_tokens)) if config.evict_every else tail
        )
    block = config.packing_block
    full_precision = config.sinks + config.tail_keep
    packed = max(kept + max_new_tokens - full_precision, block) // block * block
    tail = config.sinks + config.tail_keep + config.flush_block
    return LayerCapacity(kept, packed, tail)


def compress(
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kept: Kept,
    config: CacheConfig,
    capacity: LayerCapacity,
    window: int | None = None,
    implementation: str | None = None,
    number: int = 0,
) -> LayerCache:
    """A layer's cache of the kept prompt tokens (MiniKV section 3.3).

    The oldest tokens after the sinks are packed, as many as fill whole packing blocks (and, under the "kivi" rule,
    leave the newest `residual_length` out); the rest is the tail.

    Args:
      k, v: the prompt's keys (after RoPE) and values.
      kept: which tokens stay, at most `capacity.kept` per row.
      window: the layer's sliding window.
      number: the layer's number.
    """
    tokens = k.shape[1]
    positions = kept.positions
    # Filler slots point past the end; reading the last token instead keeps them finite wherever the prompt is.
    source = jnp.minimum(positions, tokens - 1)
    rows, heads = jnp.arange(k.shape[0])[:, None, None], jnp.arange(k.shape[2])[:, None]
    # One gather, and no transposed copy of the prompt.
    take = lambda x: x.at[rows, source, heads].get(mode="promise_in_bounds")  # noqa: E731
    kept_k, kept_v = take(k), take(v)  # [B, K, M, H]
    if not config.quantized:
        room = capacity.tail - positions.shape[-1]
        pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, room)] + [(0, 0)] * (x.ndim - 3))  # noqa: E731
        zero = jnp.zeros_like(kept.tokens)
        tail_positions = None if window is None else pad(positions)
        tails = pad(kept_k), pad(kept_v)
        return LayerCache(None, None, *tails, zero, kept.tokens, None, tail_positions, config, window, number)

    of_keys, of_values = Operand("keys", number, config), Operand("values", number, config)
    kept_k, kept_v = quantizers.rotate(kept_k, of_keys), quantizers.rotate(kept_v, of_values)
    block = config.packing_block
    beyond = jnp.maximum(kept.tokens - config.sinks - config.tail_keep, 0)
    packed_length = beyond // block * block
    slots = jnp.arange(capacity.tail)
    slots = slots + jnp.where(slots < config.sinks, 0, packed_length[:, None])  # [B, C]
    slots = jnp.minimum(slots, positions.shape[-1] - 1)[:, None]
    tail = lambda x: jnp.take_along_axis(x, slots[..., None], axis=2)  # noqa: E731
    packed_k = _packed_part(kept_k, config, capacity)
    packed_v = _packed_part(kept_v, config, capacity)
    return LayerCache(
        quantizers.quantize(packed_k, of_keys, implementation).pad_tokens(capacity.packed),
        quantizers.quantize(packed_v, of_values, implementation).pad_tokens(capacity.packed),
        tail(kept_k),
        tail(kept_v),
        packed_length,
        kept.tokens - packed_length,
        None if window is None else _pad_to(_packed_part(positions, config, capacity), capacity.packed),
        None if window is None else jnp.take_along_axis(positions, slots, axis=2),
        config,
        window,
        number,
    )


def _packed_part(x: Num[Array, "B K M ..."], config: CacheConfig, capacity: LayerCapacity) -> Array:
    """Kept tokens after the sinks, cut or padded to whole packing blocks."""
    block = config.packing_block
    most = max(x.shape[2] - config.sinks - config.tail_keep, 0)
    size = min(max(most // block * block, block), capacity.packed)
    return _pad_to(x[:, :, config.sinks : config.sinks + size], size)


def _pad_to(x: Array, size: int) -> Array:
    widths = [(0, 0), (0, 0), (0, size - x.shape[2])] + [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, widths, mode="edge" if x.shape[2] else "constant")


def append(
    layer: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"],
    implementation: str | None = None,
) -> LayerCache:
    """Adds each row's first `lengths[b]` of `T` tokens to the tail and packs the tail whenever it is full.

    There must be room (`KVCache.room`): under `jit` an overflow cannot be reported. The call then ends with the layer's
    contents and lengths undefined.
    """
    k, v = layer.rotate(k, "keys"), layer.rotate(v, "values")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    if k.shape[2] == 1 and layer.config.quantized:
        sizes = {"batch": k.shape[0], "kv_heads": k.shape[1], "head_dim": k.shape[3]}
        return kernels.run(
            "append",
            implementation,
            sizes,
            {
                "xla": lambda: _append_once(layer, k, v, lengths, positions, "xla"),
                "pallas": lambda: _append_once(layer, k, v, lengths, positions, "pallas"),  # its kernel packs
                "cuda": lambda: kernels.cuda_append(layer, k[:, :, 0], v[:, :, 0], lengths),
            },
        )
    if not layer.config.quantized:
        return _append_once(layer, k, v, lengths, positions, implementation)

    def step(state: tuple[LayerCache, Array]) -> tuple[LayerCache, Array]:
        layer, done = state
        take = jnp.minimum(lengths - done, layer.tail_capacity - layer.tail_length)
        layer = _write_tail(layer, k, v, positions, done, take)
        return _flush(layer, implementation), done + take

    def goes_on(state: tuple[LayerCache, Array]) -> Array:
        layer, done = state
        # A tail is full here only where nothing of it can be packed: the rest has no room.
        return jnp.any((done < lengths) & (layer.tail_length < layer.tail_capacity))

    return lax.while_loop(goes_on, step, (layer, jnp.zeros_like(lengths)))[0]


def _append_once(
    layer: LayerCache, k: Array, v: Array, lengths: Array, positions: Array, implementation: str | None
) -> LayerCache:
    """Adds tokens that fit the tail."""
    layer = _write_tail(layer, k, v, positions, jnp.zeros_like(lengths), lengths)
    return _flush(layer, implementation)


def _write_tail(layer: LayerCache, k: Array, v: Array, positions: Array, first: Array, count: Array) -> LayerCache:
    """Writes tokens `first[b] .. first[b] + count[b] - 1` of each row behind its tail."""
    put = _put_token if k.shape[2] == 1 else _put_tokens
    put = functools.partial(put, slot=layer.tail_length, first=first, count=count)
    tail_positions = layer.tail_positions
    if tail_positions is not None:
        tail_positions = put(tail_positions, jnp.broadcast_to(positions[:, None], k.shape[:3]))
    return dataclasses.replace(
        layer,
        tail_k=put(layer.tail_k, k),
        tail_v=put(layer.tail_v, v),
        tail_length=layer.tail_length + count,
        tail_positions=tail_positions,
    )


def _put_token(tail: Array, new: Array, slot: Array, first: Array, count: Array) -> Array:
    """`[B, K, C, ...]` tails, each with its row's one new token in `slot[b]`, or as it was where `count[b]` is 0."""
    del first
    # Writing back what stands there, rather than selecting between two tails, lets XLA update in place.
    slot = jnp.minimum(slot, tail.shape[2] - 1)
    rows = jnp.arange(tail.shape[0])
    old = tail.at[rows, :, slot].get(mode="promise_in_bounds")
    chosen = jnp.where((count > 0).reshape(-1, *[1] * (old.ndim - 1)), new[:, :, 0], old)
    return tail.at[rows, :, slot].set(chosen, mode="promise_in_bounds")


def _put_tokens(tail: Array, new: Array, slot: Array, first: Array, count: Array) -> Array:
    """Tails with `count[b]` of the row's new tokens, from `first[b]` on, in `slot[b]` and after."""
    offset = jnp.arange(new.shape[2]) - first[:, None]
    chosen = (offset >= 0) & (offset < count[:, None])
    slots = jnp.where(chosen, slot[:, None] + offset, tail.shape[2])  # out of range: dropped
    return tail.at[jnp.arange(tail.shape[0])[:, None], :, slots].set(new.swapaxes(1, 2), mode="drop")


def _flush(layer: LayerCache, implementation: str | None) -> LayerCache:
    """Packs the oldest block of every tail that is full (MiniKV section 3.3, KIVI algorithm 1)."""
    if layer.packed_capacity < layer.config.flush_block:  # not quantised, or made for too few tokens to fill a tail
        return layer
    full = layer.tail_length == layer.tail_capacity
    # A loop of zero or one turns, not a `cond`: XLA updates a loop's carry in place.
    turns = jnp.any(full).astype(jnp.int32)
    return lax.fori_loop(0, turns, lambda _, layer: _pack_block(layer, full, implementation), layer)


def _pack_block(layer: LayerCache, full: Array, implementation: str | None) -> LayerCache:
    config, sinks, block = layer.config, layer.config.sinks, layer.config.flush_block
    assert layer.k is not None and layer.v is not None
    oldest = slice(sinks, sinks + block)
    k = quantizers.quantize(layer.tail_k[:, :, oldest], layer.operand("keys"), implementation)
    v = quantizers.quantize(layer.tail_v[:, :, oldest], layer.operand("values"), implementation)

    def shift(tail: Array) -> Array:
        if not config.tail_keep:
            return tail
        kept, moved = tail[:, :, sinks : sinks + config.tail_keep], tail[:, :, sinks + block :]
        chosen = full.reshape(-1, *[1] * (tail.ndim - 1))
        return lax.dynamic_update_slice_in_dim(tail, jnp.where(chosen, moved, kept), sinks, axis=2)

    packed_positions, tail_positions = layer.packed_positions, layer.tail_positions
    if packed_positions is not None and tail_positions is not None:
        slots = jnp.where(full[:, None], layer.packed_length[:, None] + jnp.arange(block), layer.packed_capacity)
        rows = jnp.arange(full.shape[0])[:, None]
        moved = tail_positions[:, :, oldest].swapaxes(1, 2)
        packed_positions = packed_positions.at[rows, :, slots].set(moved, mode="drop")
        tail_positions = shift(tail_positions)
    return dataclasses.replace(
        layer,
        k=layer.k.write(k, layer.packed_length, full),
        v=layer.v.write(v, layer.packed_length, full),
        tail_k=shift(layer.tail_k),
        tail_v=shift(layer.tail_v),
        # Never beyond what there is, whatever was appended: kernels would read on.
        packed_length=jnp.minimum(layer.packed_length + jnp.where(full, block, 0), layer.packed_capacity),
        tail_length=layer.tail_length - jnp.where(full, block, 0),
        packed_positions=packed_positions,
        tail_positions=tail_positions,
    )


def _room(layer: LayerCache) -> Array:
    free = layer.tail_capacity - layer.tail_length
    if layer.eviction is not None:
        assert layer.config.evict_every is not None
        most = layer.eviction.budget(layer.config) + layer.config.evict_every
        return jnp.where(most <= layer.tail_capacity, jnp.iinfo(jnp.int32).max, free)
    if not layer.config.quantized:
        return free
    blocks = (layer.packed_capacity - layer.packed_length) // layer.config.flush_block
    return free - 1 + blocks * layer.config.flush_block  # the token that fills the tail needs a block to go to


def _grow(layer: LayerCache, tokens: int) -> LayerCache:
    def pad(x: Array, by: int) -> Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, by)] + [(0, 0)] * (x.ndim - 3))

    if layer.k is None or layer.v is None:
        tail_positions = None if layer.tail_positions is None else pad(layer.tail_positions, tokens)
        tail_k, tail_v = pad(layer.tail_k, tokens), pad(layer.tail_v, tokens)
        eviction = layer.eviction
        if eviction is not None and eviction.scores is not None:
            eviction = dataclasses.replace(eviction, scores=pad(eviction.scores, tokens))
        return dataclasses.replace(
            layer, tail_k=tail_k, tail_v=tail_v, tail_positions=tail_positions, eviction=eviction
        )
    block = layer.config.flush_block
    extra = -(-tokens // block) * block
    positions = None if layer.packed_positions is None else pad(layer.packed_positions, extra)
    size = layer.packed_capacity + extra
    k, v = layer.k.pad_tokens(size), layer.v.pad_tokens(size)
    return dataclasses.replace(layer, k=k, v=v, packed_positions=positions)
