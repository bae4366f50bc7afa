"""Causal attention over a prompt by cuDNN, and the score of each key by two kernels of this package.

cuDNN's own log-sum-exp comes back rounded to the query's dtype, which is too coarse for scores. Pass 1 computes it in
float32, pass 2 sums the softmax map over its queries. Neither makes an array of queries by keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from cuda_ffi import registration
from cuda_ffi.arrays import check_supported

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = ("bfloat16", "float16")
_KERNEL = "CUDA prefill kernel"


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    with_scores: bool = False,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B K T"] | None]:
    """Causal attention of right-padded rows and, if asked for, the column sums of the softmax map (MiniKV section 3.4).

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16.
      k, v: `[B, T, K, H]`, the same dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; the padding behind them may be anything, NaN included.
      scale: softmax scale, positive.
      window: query `t` sees the keys `t - window < s <= t`.
      with_scores: also return the scores.

    Returns:
      The output in q's dtype, zero in the padding, and float32 `[B, K, T]`, summed over the row's queries and the
      query heads of each KV head, zero in the padding; or None.

    Raises:
      ValueError: for shapes that do not match, a scale or a window out of range.
      NotImplementedError: for a case the kernels or cuDNN do not support, or if they cannot run here.
    """
    check_prompt(_KERNEL, q, k, lengths, scale=scale, window=window)
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
        scale=scale,
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
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
) -> Float32[Array, "B N T"]:
    """Natural log of the softmax denominator of every query, float32 `[B, N, T]`; infinity in the padding.

    Arguments and errors are those of `prefill_attention`.
    """
    check_prompt(_KERNEL, q, k, lengths, scale=scale, window=window)
    registration.load()
    batch, tokens, heads, _ = q.shape
    result = jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)
    return jax.ffi.ffi_call("minikv_row_log_sum_exp", result)(q, k, lengths, **attributes(q, scale, window))


def column_sums(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int32[Array, "B"],
    row_log_sum_exp: Float32[Array, "B N T"],
    *,
    scale: float,
    window: int | None = None,
) -> Float32[Array, "B K T"]:
    """Sums of the causal softmax map over queries, float32 `[B, K, T]`, given its `row_log_sum_exp`.

    The other arguments and the errors are those of `prefill_attention`.
    """
    check_prompt(_KERNEL, q, k, lengths, scale=scale, window=window)
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
        q, k, lengths, row_log_sum_exp, **attributes(q, scale, window)
    )[0]


def attributes(q: jax.Array, scale: float, window: int | None) -> dict[str, np.generic]:
    """Attributes of the handlers for the scale and the sliding window."""
    tokens = max(q.shape[1], 1)
    return {
        "scale": np.float32(scale),
        "window": np.int32(tokens if window is None else min(window, tokens)),
    }


def check_prompt(
    kernel: str, q: jax.Array, k: jax.Array, lengths: jax.Array, *, scale: float, window: int | None
) -> None:
    """Raises the errors of `prefill_attention` for arguments that it does not take."""
    check_supported(kernel, ("q.dtype", q.dtype.name, DTYPES))
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: expected [B, T, N, H] and [B, T, K, H]")
    if k.dtype != q.dtype:
        raise ValueError(f"k.dtype={k.dtype}: expected q's, {q.dtype}")
    check_supported(kernel, ("head_dim", q.shape[3], HEAD_DIMS))
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} KV heads: expected a multiple")
    if lengths.shape != (q.shape[0],) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths is {lengths.dtype}{lengths.shape}: expected int32({q.shape[0]},)")
    if not scale > 0:
        raise ValueError(f"scale={scale}: expected a positive number")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1")
