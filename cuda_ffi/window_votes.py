"""Sums of the causal softmax map over the last queries of each row, for nested windows of queries."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from cuda_ffi import registration
from cuda_ffi.arrays import check_supported
from cuda_ffi.prefill_attention import attributes, check_prompt

MAX_WINDOWS = 4
_KERNEL = "CUDA votes kernel"
_BLOCKS = 264  # two on each of a Hopper GPU's 132 multiprocessors: keys are split until there are about as many
_ROWS = 256  # queries per block; half of them at head dim 256
_MIN_SPLIT = 256  # keys


def window_votes(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int32[Array, "B"],
    sizes: Sequence[int],
    *,
    scale: float,
    power: int = 1,
    window: int | None = None,
) -> tuple[Float32[Array, "B K T"], ...]:
    """Sums the softmax map over each row's last queries (SnapKV section 4), without an array of queries by keys.

    Args:
      q: `[B, T, N, H]`, bfloat16 or float16.
      k: `[B, T, K, H]`, the same dtype; query head `n` reads KV head `n // (N / K)`.
      lengths: int32 `[B]`, valid tokens per row; the padding behind them may be anything, NaN included.
      sizes: numbers of last queries, ascending, at most `T`; up to 4 of them.
      scale: softmax scale, positive.
      power: the weights are summed to this power.
      window: query `t` sees the keys `t - window < s <= t`.

    Returns:
      For each size, float32 `[B, K, T]`, summed over the queries and the query heads of each KV head, zero in the
      padding.

    Raises:
      ValueError: for shapes that do not match; sizes, a scale, power or window out of range.
      NotImplementedError: for a case the kernels do not support, or if they cannot run here.
    """
    check_prompt(_KERNEL, q, k, lengths, scale=scale, window=window)
    check_supported(_KERNEL, ("number of sizes", len(sizes), range(1, MAX_WINDOWS + 1)))
    batch, tokens, heads, _ = q.shape
    if list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= tokens:
        raise ValueError(f"sizes={tuple(sizes)}: expected ascending numbers in 1..{tokens}")
    if power < 1:
        raise ValueError(f"power={power}: expected at least 1")
    registration.load()
    queries = sizes[-1]
    shapes = (
        (len(sizes), batch, k.shape[2], tokens),  # the votes; the others are scratch
        (len(sizes), batch, heads, tokens),
        (batch, heads, queries),
        (_splits(batch * heads * -(-queries // _ROWS), tokens), batch, heads, queries),
    )
    votes, *_ = jax.ffi.ffi_call("minikv_window_votes", [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes])(
        q, k, lengths, sizes=np.array(sizes, np.int32), power=np.int32(power), **attributes(q, scale, window)
    )
    return tuple(votes)


def _splits(blocks: int, tokens: int) -> int:
    """Number of parts into which the keys of a block of queries are split."""
    return max(1, min(_BLOCKS // max(blocks, 1), tokens // _MIN_SPLIT))
