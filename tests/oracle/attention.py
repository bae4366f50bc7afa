"""Plain definitions, in NumPy, of what the CUDA kernels compute: written from `docs/architecture.md` alone."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """`planes`, `scale`, `zero` and, for 8-bit metadata, the two factors, as the architecture document names them."""

    planes: tuple[np.ndarray, ...]
    scale: np.ndarray
    zero: np.ndarray
    factors: tuple[np.ndarray, np.ndarray] | None
    bits: int
    group_size: int
    axis: str

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (*self.planes, self.scale, self.zero, *(self.factors or ()))


def packing_block(bits: int, group_size: int) -> int:
    return max(group_size, 32 // min(PLANES[bits]))


def _metadata(x: np.ndarray, dtype: str, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Stored metadata, its float32 value and the factor `[..., blocks, 1]`."""
    if dtype != "float8_e4m3fn":
        limit = np.float32(ml_dtypes.finfo(DTYPES[dtype]).max)
        stored = np.clip(x, -limit, limit).astype(DTYPES[dtype])
        return stored, stored.astype(np.float32), None
    flat = x.reshape(*x.shape[:-2], blocks, -1)
    factor = np.abs(flat).max(-1, keepdims=True) * np.float32(1 / 448)
    stored = (flat * _reciprocal(factor)).astype(DTYPES[dtype])
    return stored.reshape(x.shape), (stored.astype(np.float32) * factor).reshape(x.shape), factor


def _reciprocal(x: np.ndarray) -> np.ndarray:
    """`1 / x`, and 0 where x is 0 or subnormal."""
    normal = x >= np.finfo(np.float32).tiny
    return np.where(normal, np.float32(1) / np.where(normal, x, np.float32(1)), np.float32(0))


def quantize(x: np.ndarray, bits: int, group_size: int, axis: str, dtype: str, block: int | None = None) -> Packed:
    """x `[..., S, H]` to token words; `block` tokens share a factor of 8-bit metadata."""
    x = x.astype(np.float32)
    *lead, tokens, channels = x.shape
    if axis == "tokens":
        groups, reduced = x.reshape(*lead, tokens // group_size, group_size, channels), -2
    else:
        groups, reduced = x.reshape(*lead, tokens, channels // group_size, group_size), -1
    levels = np.float32(2**bits - 1)
    low, high = groups.min(reduced), groups.max(reduced)
    blocks = tokens // (block or packing_block(bits, group_size))
    scale, scale_value, scale_factor = _metadata((high - low) * (np.float32(1) / levels), dtype, blocks)
    zero, zero_value, zero_factor = _metadata(low, dtype, blocks)
    scale_value, zero_value = np.expand_dims(scale_value, reduced), np.expand_dims(zero_value, reduced)
    steps = (groups - zero_value) * _reciprocal(scale_value)
    codes = np.clip(np.round(steps), 0, levels).astype(np.uint32).reshape(x.shape)
    planes, shift = [], 0
    for width in PLANES[bits]:
        count = 32 // width
        part = (codes >> np.uint32(shift)) & np.uint32(2**width - 1)
        part = part.reshape(*lead, tokens // count, count, channels)
        places = (np.arange(count, dtype=np.uint32) * np.uint32(width))[:, None]
        planes.append(np.bitwise_or.reduce(part << places, axis=-2))
        shift += width
    factors = None if scale_factor is None or zero_factor is None else (scale_factor, zero_factor)
    return Packed(tuple(planes), scale, zero, factors, bits, group_size, axis)


def dequantize(x: Packed) -> np.ndarray:
    """float32 `[..., S, H]`."""
    codes, shift = np.uint32(0), 0
    for words, width in zip(x.planes, PLANES[x.bits], strict=True):
        count = 32 // width
        places = (np.arange(count, dtype=np.uint32) * np.uint32(width))[:, None]
        part = (words[..., None, :] >> places) & np.uint32(2**width - 1)
        codes = codes | (part.reshape(*words.shape[:-2], -1, words.shape[-1]) << np.uint32(shift))
        shift += width

    def value(stored: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
        wide = stored.astype(np.float32)
        if factor is None:
            return wide
        return (wide.reshape(*factor.shape[:-1], -1) * factor).reshape(wide.shape)

    scale, zero = (value(m, f) for m, f in zip((x.scale, x.zero), x.factors or (None, None), strict=True))
    axis = -2 if x.axis == "tokens" else -1
    return codes.astype(np.float32) * scale.repeat(x.group_size, axis) + zero.repeat(x.group_size, axis)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One row and KV head: q `[G, H]`, k and v `[S, H]`, in float64."""
    if k.shape[0] == 0:
        return np.zeros(q.shape)
    logits = q.astype(np.float64) @ k.astype(np.float64).T * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights @ v.astype(np.float64) / weights.sum(-1, keepdims=True)


def attention_in(dtype: np.dtype, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """The same, as XLA computes it in `dtype`: operands, weights and result rounded to it, sums in float32."""
    if k.shape[0] == 0:
        return np.zeros(q.shape)
    logits = q.astype(np.float32) @ k.astype(dtype).astype(np.float32).T * np.float32(scale)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype).astype(np.float32)
    return (weights @ v.astype(dtype).astype(np.float32)).astype(dtype).astype(np.float64)


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm; NaN anywhere gives NaN, which no bound admits."""
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
    """Output `[B, T, N, H]`, column sums `[B, K, T]` and log-sum-exp `[B, N, T]` of right-padded rows.

    In float64; or, with `real` float32, as XLA computes it in q's dtype: products and sums in float32, the weights that
    meet the values and the output rounded to the dtype.
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
