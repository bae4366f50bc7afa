"""Shape checks that several attention ops share."""

from __future__ import annotations

from jaxtyping import Array

from minikv_jax.cache.state import LayerCache


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the logits, `H ** -0.5` by default."""
    return float(head_dim**-0.5) if scale is None else scale


def check_heads(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Raises ValueError unless the shapes are `[B, T, N, H]` and twice `[B, T, K, H]`."""
    if k != v:
        raise ValueError(f"k has shape {k}, v {v}: expected the same")
    if q[0] != k[0] or q[1] != k[1] or q[3] != k[3]:
        raise ValueError(f"q has shape {q}, k {k}: batch, tokens and head dim must agree")
    if q[2] % k[2]:
        raise ValueError(f"{q[2]} query heads over {k[2]} KV heads: expected a multiple")


def check_lengths(lengths: Array, batch: int) -> None:
    """Raises ValueError unless there is one length per row."""
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {lengths.shape}: expected ({batch},), one per row")


def check_cache(batch: int, heads: int, head_dim: int, layer: LayerCache) -> None:
    """Raises ValueError unless a layer's cache suits the queries."""
    rows, kv_heads, _, dim = layer.tail.k.shape
    if (rows, dim) != (batch, head_dim):
        raise ValueError(f"q has batch {batch} and head dim {head_dim}, the cache {rows} and {dim}: expected the same")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads in the cache: expected a multiple")
