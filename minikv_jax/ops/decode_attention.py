"""The three ops, their contracts, their validation, and the choice of implementation.

Shapes use one legend throughout the project: `B` batch, `T` queries, `S` keys, `N` query heads, `K` KV heads,
`G = N / K` query heads per KV head, `H` head dim; query head `n` reads KV head `n // G`. Rows are right-padded; RoPE is
applied.

Each op runs as "xla" (plain JAX, anywhere) or as a kernel ("pallas", "cuda"). `implementation=None` takes the fastest
that supports the case (`kernels.order`); one asked for by name runs or raises `NotImplementedError` with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax import packing as quantization
from minikv_jax.ops import dispatch as kernels
from minikv_jax.ops import online_softmax as reference
from minikv_jax.packing import Axis, QuantizedArray

if TYPE_CHECKING:
    from minikv_jax.cache.state import LayerCache


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    with_scores: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T"] | None]:
    """Causal attention over a prompt and, if asked for, the score of each key (MiniKV section 3.4).

    Args:
      q, k, v: float32, bfloat16 or float16, right-padded rows.
      lengths: valid tokens per row; what lies beyond may be anything, NaN too.
      scale: of the logits; `H ** -0.5` by default.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the column sums of the softmax map over the row's queries and the `G` heads of each KV
        head, in float32. Memory stays linear in `T`.

    Returns:
      The output in `q`'s dtype, zero in the padding, and the scores (zero in the padding) or None.

    Raises:
      ValueError: shapes that disagree. NotImplementedError: an `implementation` that cannot run this case.
    """
    _check_heads(q.shape, k.shape, v.shape)
    _check_lengths(lengths, q.shape[0])
    checks.at_least(1, window=window)
    batch, tokens, heads, head_dim = q.shape
    case = {"scale": _scale(scale, head_dim), "window": window, "with_scores": with_scores}
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": k.shape[2], "head_dim": head_dim}
    return kernels.run(
        "prefill_attention",
        implementation,
        sizes,
        {
            "xla": lambda: reference.prefill_attention(q, k, v, lengths, **case),
            "pallas": lambda: kernels.prefill_attention("pallas", q, k, v, lengths, **case),
            "cuda": lambda: kernels.prefill_attention("cuda", q, k, v, lengths, **case),
        },
    )


def quantize(
    x: Float[Array, "B K S H"],
    *,
    bits: int | None,
    group_size: int,
    axis: Axis,
    metadata_dtype: str = "float16",
    factor_block: int | None = None,
    implementation: str | None = None,
) -> QuantizedArray:
    """Quantises and packs keys (`axis="tokens"`) or values (`axis="channels"`): `quantization.quantize`."""
    if bits is None:
        raise ValueError("bits=None: expected a number of bits")
    case = {"bits": bits, "group_size": group_size, "axis": axis}
    case |= {"metadata_dtype": metadata_dtype, "factor_block": factor_block}
    batch, kv_heads, tokens, head_dim = x.shape
    sizes = {"batch": batch, "tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim, "bits": bits}
    return kernels.run(
        "quantize",
        implementation,
        sizes,
        {
            "xla": lambda: quantization.quantize(x, **case),
            "pallas": lambda: kernels.quantize("pallas", x, **case),
            "cuda": lambda: kernels.quantize("cuda", x, **case),
        },
    )


def decode_attention(
    q: Float[Array, "B N H"],
    layer: LayerCache,
    positions: Int[Array, "B"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query per row over all tokens in a layer's cache, read as they are stored.

    Args:
      q: the newest token's queries; its key and value are in `layer` already.
      positions: the queries' positions; needed only where the layer has a sliding window.

    Returns:
      `[B, N, H]` in `q`'s dtype; zero for a row whose cache is empty.

    Raises:
      ValueError: shapes that disagree. NotImplementedError: an `implementation` that cannot run this case.
    """
    _check_cache(q.shape[0], q.shape[1], q.shape[2], layer)
    scale = _scale(scale, q.shape[-1])
    positions = _positions(positions, layer, q.shape[:1])
    q = layer.rotate(q, "keys")
    batch, heads, head_dim = q.shape
    sizes = {"batch": batch, "tokens": layer.packed_capacity + layer.tail_capacity, "heads": heads}
    sizes |= {"kv_heads": layer.tail_k.shape[1], "head_dim": head_dim, "bits": layer.config.k_bits or 16}
    out = kernels.run(
        "decode_attention",
        implementation,
        sizes,
        {
            "xla": lambda: reference.decode_attention(q, layer, positions, scale=scale),
            "pallas": lambda: kernels.decode_attention("pallas", q, layer, scale=scale),
            "cuda": lambda: kernels.decode_attention("cuda", q, layer, scale=scale),
        },
    )
    return layer.rotate(out, "values", back=True)


def decode_attention_weights(
    q: Float[Array, "B N H"],
    layer: LayerCache,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K C"]]:
    """`decode_attention` over a full-precision cache, and the weights that each tail slot got.

    Weights are float32, summed over the `G` query heads of a KV head, and zero in empty slots.

    Raises:
      ValueError: shapes that disagree, or a quantised cache. NotImplementedError: an `implementation` other than "xla".
    """
    _check_cache(q.shape[0], q.shape[1], q.shape[2], layer)
    if layer.k is not None or layer.window is not None:
        raise ValueError(
            f"k_bits={layer.config.k_bits}, window={layer.window}: weights are of full-precision tails only"
        )
    scale = _scale(scale, q.shape[-1])
    return kernels.run(
        "decode_attention_weights",
        implementation,
        {},
        {"xla": lambda: reference.decode_attention_weights(q, layer, scale=scale)},
    )


def extend_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: LayerCache,
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of several new tokens per row: over the cache, and causally over one another in full precision.

    `k` and `v` are the new tokens', not yet in `layer`; each row has `lengths[b]` of them. Plain JAX only.

    Raises:
      ValueError: shapes that disagree. NotImplementedError: an `implementation` other than "xla".
    """
    _check_heads(q.shape, k.shape, v.shape)
    _check_lengths(lengths, q.shape[0])
    _check_cache(q.shape[0], q.shape[2], q.shape[3], layer)
    scale = _scale(scale, q.shape[-1])
    positions = _positions(positions, layer, q.shape[:2])
    q, k, v = layer.rotate(q, "keys"), layer.rotate(k, "keys"), layer.rotate(v, "values")
    out = kernels.run(
        "extend_attention",
        implementation,
        {},
        {"xla": lambda: reference.extend_attention(q, k, v, layer, lengths, positions, scale=scale)},
    )
    return layer.rotate(out, "values", back=True)


def _scale(scale: float | None, head_dim: int) -> float:
    return float(head_dim**-0.5) if scale is None else scale


def _positions(positions: Array | None, layer: LayerCache, shape: tuple[int, ...]) -> Array:
    if positions is not None:
        return positions
    if layer.window is not None:
        raise ValueError(f"positions=None: a layer with a sliding window ({layer.window}) needs the queries' positions")
    return jnp.zeros(shape, jnp.int32)


def _check_heads(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    if k != v:
        raise ValueError(f"k has shape {k}, v {v}: expected the same")
    if q[0] != k[0] or q[1] != k[1] or q[3] != k[3]:
        raise ValueError(f"q has shape {q}, k {k}: batch, tokens and head dim must agree")
    if q[2] % k[2]:
        raise ValueError(f"{q[2]} query heads over {k[2]} KV heads: expected a multiple")


def _check_lengths(lengths: Array, batch: int) -> None:
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {lengths.shape}: expected ({batch},), one per row")


def _check_cache(batch: int, heads: int, head_dim: int, layer: LayerCache) -> None:
    rows, kv_heads, _, dim = layer.tail_k.shape
    if (rows, dim) != (batch, head_dim):
        raise ValueError(f"q has batch {batch} and head dim {head_dim}, the cache {rows} and {dim}: expected the same")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads in the cache: expected a multiple")
