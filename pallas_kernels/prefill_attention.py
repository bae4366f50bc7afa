"""Causal attention over a prompt and, if asked for, the column sums of its softmax map.

The first pass is flash attention, which keeps the log-sum-exp of each query's logits in float32. The second pass
computes the column sums from it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import column_sums, flash_attention, hopper
from pallas_kernels.arrays import check_supported

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
_KERNEL = "Pallas prefill kernel"


class Config(NamedTuple):
    """Tuning of the two passes; None for the winner recorded for the device, or the heuristic without a record."""

    attention: flash_attention.Config | None = None
    sums: column_sums.Config | None = None


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    with_scores: bool = False,
    config: Config | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B K T"] | None]:
    """Causal attention over right-padded rows, as `docs/packed-layout.md` defines it.

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16, H 64 or 128.
      k, v: `[B, T, K, H]`, q's dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; the padding behind them may be anything, NaN included.
      scale: softmax scale, positive.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the column sums of the softmax map over the row's queries and the heads of a KV head.
      config: tuning.

    Returns:
      `out [B, T, N, H]` in q's dtype and `scores [B, K, T]` in float32 or None, both zero in the padding.

    Raises:
      ValueError: for shapes or dtypes that do not match, or a config that does not fit the device.
      NotImplementedError: for a case the kernels do not support, or if they cannot run here.
    """
    check(q, k, v, lengths, scale=scale, window=window)
    hopper.check_available()
    head_dim = q.shape[3]
    attention_config, sums_config = config or Config()
    attention_config = attention_config or flash_attention.default_config(head_dim)
    sums_config = sums_config or column_sums.default_config(head_dim)
    tokens = q.shape[1]
    q, k, v = (jnp.pad(x, [(0, 0), (0, -tokens % flash_attention.BLOCK), (0, 0), (0, 0)]) for x in (q, k, v))
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, tokens)
    if window is not None and window >= tokens:
        window = None
    out, lse = flash_attention.flash_attention(q, k, v, lengths, scale=scale, window=window, config=attention_config)
    if not with_scores:
        return out[:, :tokens], None
    scores = column_sums.column_sums(q, k, lse, lengths, scale=scale, window=window, config=sums_config)
    return out[:, :tokens], scores[:, :, :tokens]


def check(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, window: int | None = None
) -> None:
    """Refuses what the kernels do not support, from shapes and dtypes.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes that do not match.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, N, H] and twice [B, T, K, H]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} KV heads: expected a multiple")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape}: expected {q.shape[:1]}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}: expected the same")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1")
    check_supported(_KERNEL, ("q.dtype", q.dtype.name, DTYPES), ("head_dim", q.shape[3], HEAD_DIMS))
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: the {_KERNEL} supports positive scales")
