"""Causal attention over a prompt, with the column sums of its softmax map if asked for.

Two passes: flash attention, which keeps the log-sum-exp of each query's logits in float32, then the column sums, which
need it to begin with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import column_sums, flash_attention, hopper

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    with_scores: bool,
    config: flash_attention.Config | None = None,
    sums_config: column_sums.Config | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal attention over right-padded rows, as `docs/architecture.md` defines it.

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16, H 64 or 128.
      k, v: `[B, T, K, H]`, q's dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; what lies beyond may be anything, NaN too.
      scale: of the logits, positive.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the column sums of the softmax map over the row's queries and the heads of a KV head.
      config: tuning of the first pass, by default the device's winner or the heuristic.
      sums_config: tuning of the second pass, likewise.

    Returns:
      `out [B, T, N, H]` in q's dtype and `scores [B, K, T]` in float32 or None, both zero in the padding.

    Raises:
      ValueError: for shapes or dtypes that do not belong together, or a config that does not fit the device.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    check(q, k, v, lengths, scale=scale, window=window)
    reason = hopper.why_unavailable()
    if reason:
        raise NotImplementedError(reason)
    head_dim = q.shape[3]
    config = config or flash_attention.default_config(head_dim)
    sums_config = sums_config or column_sums.default_config(head_dim)
    tokens = q.shape[1]
    q, k, v = (jnp.pad(x, [(0, 0), (0, -tokens % flash_attention.BLOCK), (0, 0), (0, 0)]) for x in (q, k, v))
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, tokens)
    if window is not None and window >= tokens:
        window = None
    out, lse = flash_attention.flash_attention(q, k, v, lengths, scale=scale, window=window, config=config)
    if not with_scores:
        return out[:, :tokens], None
    scores = column_sums.column_sums(q, k, lse, lengths, scale=scale, window=window, config=sums_config)
    return out[:, :tokens], scores[:, :, :tokens]


def check(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, window: int | None = None
) -> None:
    """Refuses what the kernels do not cover; looks at shapes and dtypes alone.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes that do not belong together.
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
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"q.dtype={q.dtype}: the Pallas prefill kernel supports {' and '.join(DTYPES)}")
    if q.shape[3] not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={q.shape[3]}: the Pallas prefill kernel supports 64 and 128")
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: the Pallas prefill kernel supports positive scales")
