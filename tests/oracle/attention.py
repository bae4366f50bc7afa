"""Reference attention in NumPy: in float64, or rounded as XLA rounds in 16 bits."""

from __future__ import annotations

import numpy as np


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Computes the attention of one row and KV head in float64: q `[G, H]`, k and v `[S, H]`."""
    if k.shape[0] == 0:
        return np.zeros(q.shape)
    logits = q.astype(np.float64) @ k.astype(np.float64).T * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights @ v.astype(np.float64) / weights.sum(-1, keepdims=True)


def attention_in(dtype: np.dtype, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Computes `attention` as XLA does in `dtype`: operands, weights and result rounded, sums in float32."""
    if k.shape[0] == 0:
        return np.zeros(q.shape)
    logits = q.astype(np.float32) @ k.astype(dtype).astype(np.float32).T * np.float32(scale)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype).astype(np.float32)
    return (weights @ v.astype(dtype).astype(np.float32)).astype(dtype).astype(np.float64)


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference relative to the norm; NaN anywhere gives NaN, which exceeds every bound."""
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(out.astype(np.float64) - expected))
    return difference / norm if norm else difference


def causal_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    scale: float,
    window: int | None,
    real: type[np.floating] = np.float64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes output `[B, T, N, H]`, column sums `[B, K, T]` and log-sum-exp `[B, N, T]` of right-padded rows.

    It computes in float64. With `real` float32, it computes as XLA does in q's dtype: products and sums in float32, the
    weights that multiply the values and the output rounded to the dtype.
    """
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    rounded = (lambda x: x) if real == np.float64 else (lambda x: x.astype(q.dtype).astype(real))
    out, scores = np.zeros(q.shape, real), np.zeros((batch, kv_heads, tokens), real)
    lse = np.full((batch, heads, tokens), np.inf, real)
    for b, length in enumerate(lengths):
        distance = np.arange(length)[:, None] - np.arange(length)
        seen = (distance >= 0) & (distance < (window or tokens))
        for n in range(heads):
            head = n * kv_heads // heads
            queries, keys, values = (x[b, :length, i].astype(real) for x, i in ((q, n), (k, head), (v, head)))
            logits = np.where(seen, queries @ keys.T * real(scale), real(-np.inf))
            top = logits.max(-1, initial=-np.inf)
            lse[b, n, :length] = top + np.log(np.exp(logits - top[:, None]).sum(-1))
            weights = np.exp(logits - lse[b, n, :length, None])
            out[b, :length, n] = rounded(rounded(weights) @ values)
            scores[b, head, :length] += weights.sum(0)
    return out, scores, lse
