"""A layer's cache as a value: frozen pytrees with static capacities and true lengths per row.

A layer has two regions (`docs/packed-layout.md`): packed codes, and a full-precision tail whose first slots are the
sinks. `ops/compress.py` makes a layer from a prompt, `ops/append.py` adds tokens and packs full tails, `ops/evict.py`
drops tokens. All are pure functions, and inside a compiled loop XLA updates their arrays in place. Capacities depend
only on the method and the sizes (`capacity.py`), so the bytes of a cache are known before it exists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax.cache.spec import LayerSpec, Packed
from minikv_jax.methods.base import MAX_TOKENS
from minikv_jax.methods.method import Method
from minikv_jax.packing import QuantizedArray, StoredArray

Stored = TypeVar("Stored", Array, Packed)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region(Generic[Stored]):
    """Keys and values of a part of a layer's tokens: the packed ones, or the tail.

    Attributes:
      k, v: packed codes, or `[B, K, C, H]` in the tail.
      length: int32 `[B]`, valid tokens per row. Slots beyond them hold garbage.
      positions: int32 `[B, K, capacity]`, original positions; None unless the layer has a sliding window.
    """

    k: Stored
    v: Stored
    length: Int[Array, "B"]
    positions: Int[Array, "B K S"] | None

    @property
    def capacity(self) -> int:
        """Number of token slots per row."""
        return self.k.num_tokens if isinstance(self.k, QuantizedArray | StoredArray) else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.k.nbytes + self.v.nbytes


def empty_region(length: Int[Array, "B"]) -> Region[Packed]:
    """Makes the packed region of a layer that does not quantise: no tokens, and no room for any."""
    nothing = StoredArray((), 0)
    return Region(nothing, nothing, jnp.zeros_like(length), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eviction:
    """State of a layer that evicts during generation (`ops/evict.py`).

    Attributes:
      scores: float32, score of each tail slot, zero if it is empty; None if nothing is kept by score.
      heavy, recent: int32, tokens per row that an eviction leaves, in addition to the sinks.
    """

    scores: Float[Array, "B K C"] | None
    heavy: Int[Array, "B"]
    recent: Int[Array, "B"]

    def budget(self, method: Method) -> Int[Array, "B"]:
        """Tokens per row that an eviction leaves, sinks included."""
        return method.sinks + self.heavy + self.recent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's cache: a frozen pytree of packed tokens and a full-precision tail (MiniKV section 3.3).

    `prefill_layer` makes one, `append` adds tokens, and `decode_attention` reads it. The layout is specified in
    `docs/packed-layout.md`.

    Attributes:
      packed: quantised tokens, older than those of the tail; no capacity if the method does not quantise.
      tail: `[B, K, C, H]` in the model's dtype: first the sinks, then the newest tokens, in the quantizer's basis.
      eviction: scores and budgets that decide which tokens leave the tail; None without `Method.evict_every`.
      spec: the method, and the layer's window and number (static).
    """

    packed: Region[Packed]
    tail: Region[Array]
    eviction: Eviction | None
    spec: LayerSpec = _static()

    @property
    def method(self) -> Method:
        """The compression method."""
        return self.spec.method

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """The layer's parts, as in `HeadGroups`: only this cache, which holds all heads."""
        return (self,)

    @property
    def tokens(self) -> Int[Array, "B"]:
        """int32, number of tokens held per row."""
        return self.packed.length + self.tail.length

    def packed_tokens(self, start: Array | int, size: int, dtype: DTypeLike) -> tuple[Array, Array]:
        """Dequantises some of the packed tokens.

        Args:
          start: first token, a multiple of the packing block.
          size: number of tokens, a multiple of the packing block.
          dtype: dtype of the result.

        Returns:
          Keys and values `[B, K, size, H]`, in the basis of the cache.
        """
        k, v = self.packed.k.tokens(start, size), self.packed.v.tokens(start, size)
        return self.spec.decode(k, "keys", dtype), self.spec.decode(v, "values", dtype)

    def free(self) -> Int[Array, "B"]:
        """Number of empty slots in each row's tail."""
        return self.tail.capacity - self.tail.length

    def room(self) -> Int[Array, "B"]:
        """Number of tokens that can still be appended to each row."""
        method, free = self.method, self.free()
        if self.eviction is not None:
            assert method.evict_every is not None
            largest = self.eviction.budget(method) + method.evict_every
            return jnp.where(largest <= self.tail.capacity, jnp.iinfo(jnp.int32).max, free)
        if method.quantizer is None:
            return free
        blocks = (self.packed.capacity - self.packed.length) // method.flush_block
        return free - 1 + blocks * method.flush_block  # the token that fills the tail needs a free packed block

    def grow(self, tokens: int) -> LayerCache:
        """Makes room for `tokens` more tokens per row.

        Raises:
          ValueError: not an int in 0..16777216.
        """
        tokens = checks.integer("tokens", tokens, 0, MAX_TOKENS)
        if self.method.quantizer is None:
            tail = _pad_region(self.tail, _pad(self.tail.k, tokens), _pad(self.tail.v, tokens), tokens)
            eviction = self.eviction
            if eviction is not None and eviction.scores is not None:
                eviction = dataclasses.replace(eviction, scores=_pad(eviction.scores, tokens))
            return dataclasses.replace(self, tail=tail, eviction=eviction)
        block = self.method.flush_block
        extra = -(-tokens // block) * block
        size = self.packed.capacity + extra
        k, v = self.packed.k.pad_tokens(size), self.packed.v.pad_tokens(size)
        return dataclasses.replace(self, packed=_pad_region(self.packed, k, v, extra))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Cache of a layer in which some KV heads keep all tokens (`Method.retrieval_heads`): a `LayerCache` per group.

    Attributes:
      parts: caches of the retrieval heads and of the other heads; only one if the layer has no others.
      heads: KV heads of each part, in its order (static).
      spec: the method, and the layer's window and number (static).
    """

    parts: tuple[LayerCache, ...]
    heads: tuple[tuple[int, ...], ...] = _static()
    spec: LayerSpec = _static()

    @property
    def method(self) -> Method:
        """The compression method."""
        return self.spec.method

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts)

    @property
    def eviction(self) -> None:
        """None: a method with retrieval heads does not evict during generation."""
        return None

    @property
    def tokens(self) -> Int[Array, "B"]:
        """int32, number of tokens held per row: the mean over the KV heads, rounded down."""
        counts = [len(heads) * part.tokens for heads, part in zip(self.heads, self.parts, strict=True)]
        return functools.reduce(jnp.add, counts) // sum(map(len, self.heads))

    def room(self) -> Int[Array, "B"]:
        """Number of tokens that can still be appended to each row."""
        return functools.reduce(jnp.minimum, (part.room() for part in self.parts))

    def grow(self, tokens: int) -> HeadGroups:
        """Makes room for `tokens` more tokens per row, as `LayerCache.grow`."""
        return dataclasses.replace(self, parts=tuple(part.grow(tokens) for part in self.parts))

    def attend(
        self, attend_part: AttendPart, q: Array, k: Array, v: Array, sink_logits: Array | None
    ) -> tuple[Array, HeadGroups]:
        """Calls a function with each part and the arrays of its heads.

        Args:
          attend_part: returns the part's attention output and its new cache.
          q, k, v: `[B, T, heads, H]`.
          sink_logits: `[N]`, or None.

        Returns:
          The output of all heads, in their order, and the new cache.
        """
        outputs, parts = [], []
        for part, heads in zip(self.parts, self.heads, strict=True):
            of_heads = functools.partial(take_heads, heads=heads, kv_heads=k.shape[2])
            sinks = None if sink_logits is None else of_heads(sink_logits, axis=0)
            out, new = attend_part(part, of_heads(q, axis=2), of_heads(k, axis=2), of_heads(v, axis=2), sinks)
            outputs.append(out)
            parts.append(new)
        order = sorted(range(k.shape[2]), key=[head for heads in self.heads for head in heads].__getitem__)
        out = take_heads(jnp.concatenate(outputs, axis=2), tuple(order), k.shape[2], axis=2)
        return out, dataclasses.replace(self, parts=tuple(parts))


AttendPart = Callable[[LayerCache, Array, Array, Array, Array | None], tuple[Array, LayerCache]]


def take_heads(x: Array, heads: tuple[int, ...], kv_heads: int, axis: int) -> Array:
    """Takes the query or KV heads that belong to some KV heads, along the axis of the heads."""
    grouped = x.reshape(*x.shape[:axis], kv_heads, -1, *x.shape[axis + 1 :])
    taken = jnp.take(grouped, jnp.asarray(heads), axis=axis)
    return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _pad(x: Array, extra: int) -> Array:
    """Pads `[B, K, S, ...]` with zeros for `extra` tokens at the end."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3))


def _pad_region(region: Region, k: Any, v: Any, extra: int) -> Region:
    positions = None if region.positions is None else _pad(region.positions, extra)
    return dataclasses.replace(region, k=k, v=v, positions=positions)
