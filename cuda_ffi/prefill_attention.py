"""Causal attention over a prompt with the score of each key: cuDNN's output, and column sums from two passes of ours.

cuDNN's own log-sum-exp comes back rounded to the query's dtype, too coarse for scores; pass 1 computes it in float32,
pass 2 sums the softmax map over its queries. Neither makes an array of queries by keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    with_scores: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal attention of right-padded rows and, if asked for, the column sums of the softmax map (MiniKV section 3.4).

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16.
      k, v: `[B, T, K, H]`, the same dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; what lies beyond may be anything, NaN included.
      scale: softmax scale, positive; `H ** -0.5` unless given.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the scores.

    Returns:
      The output in q's dtype, zero in the padding, and float32 `[B, K, T]`, summed over the row's queries and the
      query heads of each KV head, zero in the padding; or None.

    Raises:
      ValueError: for shapes that do not belong together, a scale or a window out of range.
      NotImplementedError: for a case the kernels or cuDNN do not cover, or where they cannot run.
    """
    _check(q, k, lengths, scale, window)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v is {v.dtype}{v.shape}: expected as k, {k.dtype}{k.shape}")
    registration.load()
    valid = (jnp.arange(q.shape[1]) < lengths[:, None])[..., None, None]
    # cuDNN gives padding no weight, but no weight times NaN is NaN.
    clean_k, clean_v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
    out = jax.nn.dot_product_attention(
        q,
        clean_k,
        clean_v,
        scale=_scale(q, scale),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None or window >= q.shape[1] else (window - 1, 0),
        implementation="cudnn",
    )
    out = jnp.where(valid, out, 0)
    if not with_scores:
        return out, None
    row = row_log_sum_exp(q, k, lengths, scale=scale, window=window)
    return out, column_sums(q, k, lengths, row, scale=scale, window=window)


def row_log_sum_exp(
    q: jax.Array, k: jax.Array, lengths: jax.Array, *, scale: float | None = None, window: int | None = None
) -> jax.Array:
    """Natural log of the softmax denominator of every query, float32 `[B, N, T]`; infinity in the padding.

    Arguments and errors are those of `prefill_attention`.
    """
    _check(q, k, lengths, scale, window)
    registration.load()
    batch, tokens, heads, _ = q.shape
    result = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    return jax.ffi.ffi_call("minikv_row_log_sum_exp", result)(q, k, lengths, **_attributes(q, scale, window))


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lengths: jax.Array,
    row_log_sum_exp: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Sums of the causal softmax map over queries, float32 `[B, K, T]`, given its `row_log_sum_exp`.

    The other arguments and the errors are those of `prefill_attention`.
    """
    _check(q, k, lengths, scale, window)
    batch, tokens, heads, _ = q.shape
    if row_log_sum_exp.shape != (batch, heads, tokens) or row_log_sum_exp.dtype != jnp.float32:
        raise ValueError(
            f"row_log_sum_exp is {row_log_sum_exp.dtype}{row_log_sum_exp.shape}: expected "
            f"float32{(batch, heads, tokens)}"
        )
    registration.load()
    sums = jax.ShapeDtypeStruct((batch, k.shape[2], tokens), jnp.float32)
    of_heads = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)  # scratch
    return jax.ffi.ffi_call("minikv_column_sums", (sums, of_heads))(
        q, k, lengths, row_log_sum_exp, **_attributes(q, scale, window)
    )[0]


def _scale(q: jax.Array, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _attributes(q: jax.Array, scale: float | None, window: int | None) -> dict[str, np.generic]:
    tokens = max(q.shape[1], 1)
    return {
        "scale": np.float32(_scale(q, scale)),
        "window": np.int32(tokens if window is None else min(window, tokens)),
    }


def _check(q: jax.Array, k: jax.Array, lengths: jax.Array, scale: float | None, window: int | None) -> None:
    if q.dtype.name not in DTYPES:
        raise NotImplementedError(f"q.dtype={q.dtype}: the CUDA prefill kernels support {', '.join(DTYPES)}")
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: expected [B, T, N, H] and [B, T, K, H]")
    if k.dtype != q.dtype:
        raise ValueError(f"k.dtype={k.dtype}: expected q's, {q.dtype}")
    if q.shape[3] not in HEAD_DIMS:
        supported = ", ".join(map(str, HEAD_DIMS))
        raise NotImplementedError(f"head_dim={q.shape[3]}: the CUDA prefill kernels support {supported}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} KV heads: expected a multiple")
    if lengths.shape != (q.shape[0],) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}: expected int32({q.shape[0]},)")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}: expected a positive number")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1")
