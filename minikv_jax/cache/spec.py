"""The static part of a layer's cache: its method, window and number, and the KV heads that keep all tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax.methods import calls
from minikv_jax.methods.base import Kind
from minikv_jax.methods.method import Method
from minikv_jax.models.windows import Window
from minikv_jax.packing import QuantizedArray, StoredArray

Packed = QuantizedArray | StoredArray


def check_heads_stay_together(method: Method, shards: int) -> None:
    """Raises NotImplementedError if a method with retrieval heads is to split its heads into several shards."""
    if method.retrieval_heads and shards > 1:
        raise NotImplementedError(
            f"retrieval_heads on a mesh with model={shards}: expected model=1, as groups of heads are not split"
        )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Static part of a layer's cache.

    Attributes:
      method: the compression method.
      window: sliding window of the layer: query `t` sees the keys `t - window < s <= t`; or its `Chunk`; None if
        it sees all.
      layer: number of the layer in the model if the quantizer reads it (`by_layer`), else 0, so that layers of equal
        shapes share a program.
      retrieval_heads: KV heads of the layer that keep all tokens; by default the method's.
    """

    method: Method
    window: Window | None = None
    layer: int = 0
    retrieval_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.retrieval_heads is None:
            own = tuple(head for layer, head in self.method.retrieval_heads if layer == self.layer)
            object.__setattr__(self, "retrieval_heads", own)
        if self.method.quantizer is None or not self.method.quantizer.by_layer:
            object.__setattr__(self, "layer", 0)

    def by_heads(self, kv_heads: int) -> dict[tuple[int, ...], LayerSpec]:
        """Specs of the layer's retrieval heads and of its other heads, by KV heads; without those of no heads."""
        assert self.retrieval_heads is not None
        others = tuple(head for head in range(kv_heads) if head not in self.retrieval_heads)
        methods = {self.retrieval_heads: self.method.of_retrieval_heads, others: self.method.of_other_heads}
        return {
            heads: dataclasses.replace(self, method=method, retrieval_heads=())
            for heads, method in methods.items()
            if heads
        }

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
