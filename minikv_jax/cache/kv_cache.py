"""The cache of a whole model as a value: its layers' caches, and how many tokens each row has seen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minikv_jax import checks
from minikv_jax.arrays import Contract, is_traced
from minikv_jax.cache.state import HeadGroups, LayerCache
from minikv_jax.methods.base import MAX_TOKENS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A model's compressed KV cache: a frozen pytree, which functions take and return as a value.

    `prefill` and `generate` make one. Capacities are static, so the bytes are known beforehand (`memory.report`).

    Attributes:
      layers: the layers' caches.
      length: int32, tokens that each row has seen, which is the next token's position.
    """

    layers: tuple[LayerCache | HeadGroups, ...]
    length: Int[Array, "B"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, lengths included; equal to `memory.report(...).bytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zero points of all layers, as counted in MiniKV's paper."""
        return sum(part.packed.nbytes for part in self.parts)

    @property
    def kept_tokens(self) -> Int[Array, "L B"]:
        """int32, number of tokens held per layer and row; with retrieval heads, the mean over KV heads."""
        return jnp.stack([layer.tokens for layer in self.layers])

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """The parts of all layers, in order: one per layer, or two if only some of its heads keep all tokens."""
        return tuple(part for layer in self.layers for part in layer.parts)

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
