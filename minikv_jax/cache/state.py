"""The KV cache as a value: frozen pytrees with static capacities and true lengths per row.

A layer has two regions (`docs/packed-layout.md`): packed codes, and a full-precision tail whose first slots are the
sinks. `ops/compress.py` makes a layer from a prompt, `ops/append.py` adds tokens and packs full tails, `ops/evict.py`
drops tokens. All are pure functions, and inside a compiled loop XLA updates their arrays in place. Capacities depend
only on the method and the sizes (`capacity.py`), so the bytes of a cache are known before it exists.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax.arrays import Contract, is_traced
from minikv_jax.methods import calls
from minikv_jax.methods.base import MAX_TOKENS, Kind
from minikv_jax.methods.method import Method
from minikv_jax.models.windows import Window
from minikv_jax.packing import QuantizedArray, StoredArray

Packed = QuantizedArray | StoredArray
Stored = TypeVar("Stored", Array, Packed)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Static part of a layer's cache.

    Attributes:
      method: the compression method.
      window: sliding window of the layer: query `t` sees the keys `t - window < s <= t`; or its `Chunk`; None if
        it sees all.
      layer: number of the layer in the model if the quantizer reads it (`by_layer`), else 0, so that layers of equal
        shapes share a program.
    """

    method: Method
    window: Window | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        if self.method.quantizer is None or not self.method.quantizer.by_layer:
            object.__setattr__(self, "layer", 0)

    def encode(self, x: Float[Array, "B K S H"], kind: Kind) -> Packed:
        """Packs tokens in plain JAX. The method must have a quantizer."""
        assert self.method.quantizer is not None
        stored = calls.encode(self.method.quantizer, x, self.method.quantizer.operand(kind, self.layer))
        return stored if isinstance(stored, QuantizedArray) else StoredArray(stored, x.shape[2])

    def decode(self, packed: Packed, kind: Kind, dtype: DTypeLike) -> Float[Array, "B K S H"]:
        """Unpacks tokens and rounds them to `dtype` once."""
        assert self.method.quantizer is not None
        stored = packed.arrays if isinstance(packed, StoredArray) else packed
        shape = (*jax.tree.leaves(stored)[0].shape[:2], packed.num_tokens)
        operand = self.method.quantizer.operand(kind, self.layer)
        return calls.decode(self.method.quantizer, stored, operand, shape).astype(dtype)

    def to_basis(self, x: Float[Array, "*lead H"], kind: Kind) -> Float[Array, "*lead H"]:
        """Rotates keys or queries ("keys"), or values ("values"), into the basis of the cache."""
        return self._turn(x, kind, back=False)

    def from_basis(self, x: Float[Array, "*lead H"], kind: Kind) -> Float[Array, "*lead H"]:
        """Rotates vectors back from the basis of the cache."""
        return self._turn(x, kind, back=True)

    def _turn(self, x: Array, kind: Kind, *, back: bool) -> Array:
        quantizer = self.method.quantizer
        if quantizer is None:
            return x
        rotation = calls.rotation(quantizer, quantizer.operand(kind, self.layer), x.shape[-1])
        if rotation is None:
            return x
        rotation = rotation.T if back else rotation
        exact = jax.lax.Precision.HIGHEST
        return jnp.matmul(x.astype(jnp.float32), rotation.astype(jnp.float32), precision=exact).astype(x.dtype)


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


def _pad(x: Array, extra: int) -> Array:
    """Pads `[B, K, S, ...]` with zeros for `extra` tokens at the end."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 3))


def _pad_region(region: Region, k: Any, v: Any, extra: int) -> Region:
    positions = None if region.positions is None else _pad(region.positions, extra)
    return dataclasses.replace(region, k=k, v=v, positions=positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A model's compressed KV cache: a frozen pytree, which functions take and return as a value.

    `prefill` and `generate` make one. Capacities are static, so the bytes are known beforehand (`memory.report`).

    Attributes:
      layers: the layers' caches.
      length: int32, tokens that each row has seen, which is the next token's position.
    """

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, lengths included; equal to `memory.report(...).bytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points of all layers, as counted in MiniKV's paper."""
        return sum(layer.packed.nbytes for layer in self.layers)

    @property
    def kept_tokens(self) -> Int[Array, "L B"]:
        """int32, number of tokens held per layer and row."""
        return jnp.stack([layer.tokens for layer in self.layers])

    def room(self) -> int:
        """Number of tokens that can still be appended to every row: `2**31 - 1` if evictions make room.

        Raises:
          ValueError: under `jit`, where the lengths are not known; `LayerCache.room` works there.
        """
        if is_traced(self.length):
            raise ValueError("KVCache.room reads the lengths, which jit does not know: take LayerCache.room")
        return min(int(layer.room().min()) for layer in self.layers)

    def grow(self, tokens: int) -> KVCache:
        """Makes room for `tokens` more tokens per row.

        Args:
          tokens: an int in 0..16777216. Packed regions grow by whole blocks.

        Returns:
          The same cache with larger capacities.

        Raises:
          ValueError: not such an int.
        """
        return dataclasses.replace(self, layers=tuple(layer.grow(tokens) for layer in self.layers))

    def select_rows(self, rows: Int[Array, "R"]) -> KVCache:
        """Selects rows of the cache, for beam search or forks of a shared prefix.

        Args:
          rows: numbers of the rows in any order, with or without repetition. Under `jit`, a number out of range is
            clipped; `debug_checks` reports it.

        Returns:
          A cache of `R` rows.

        Raises:
          ValueError: not integers `[R]`, or a row that the cache does not have.
        """
        rows = Contract("select_rows").integers("rows", rows, "R", 0, self.length.shape[0] - 1)
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), self)

    def tile(self, times: int) -> KVCache:
        """Repeats each row: row `b` becomes rows `b * times .. (b + 1) * times - 1`.

        Args:
          times: number of copies of each row, at least 1.

        Returns:
          A cache of `B * times` rows.

        Raises:
          ValueError: `times` is not a positive int.
        """
        times = checks.integer("times", times, 1, MAX_TOKENS)
        return self.select_rows(jnp.repeat(jnp.arange(self.length.shape[0]), times))
