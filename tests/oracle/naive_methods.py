"""Naive NumPy versions of all scorers and quantisers besides MiniKV's (`naive.py`), from the papers' formulas.

They take one row and one KV head at a time, in float64. q[n, G, H] are the queries of the head's group, k and v[n, H]
its keys and values, and `n` is the row's length.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from oracle.naive import pool, softmax, tokens_of

from minikv_jax.methods.critical_kv import CriticalKV
from minikv_jax.methods.expected_attention import ExpectedAttention
from minikv_jax.methods.keydiff import KeyDiff
from minikv_jax.methods.knorm import KNorm
from minikv_jax.methods.lagkv import LagKV
from minikv_jax.methods.method import Method
from minikv_jax.methods.rest_kv import ReSTKV
from minikv_jax.methods.tova import TOVA


def tova(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Computes the last query's weights, averaged over heads, for every KV head; q[n, N, H], k[n, K, H]."""
    n, N, H = q.shape
    K = k.shape[1]
    weights = [softmax(k[:, head // (N // K)].astype(np.float64) @ q[n - 1, head] / np.sqrt(H)) for head in range(N)]
    return np.mean(weights, axis=0)


def knorm(k: np.ndarray) -> np.ndarray:
    return np.array([-np.sqrt(np.sum(key.astype(np.float64) ** 2)) for key in k])


def keydiff(k: np.ndarray) -> np.ndarray:
    unit = np.array([key / np.sqrt(np.sum(key.astype(np.float64) ** 2)) for key in k])
    anchor = unit.mean(axis=0)
    return np.array([-(key @ anchor) / np.sqrt(anchor @ anchor) for key in unit])


def lagkv(k: np.ndarray, v: np.ndarray, *, sinks: int, lag: int, padded: int) -> np.ndarray:
    """Ranks tokens in 1/lag within each partition followed by a whole one; other tokens get 1 + position / padded."""
    n = len(k)
    scores = 1 + np.arange(n) / padded
    partitions = max(n - sinks, 0) // lag
    for p in range(partitions - 1):
        first = sinks + p * lag
        own, following = slice(first, first + lag), slice(first + lag, first + 2 * lag)
        total = np.zeros(lag)
        for x in (k.astype(np.float64), v.astype(np.float64)):
            low, high = x[following].min(axis=0), x[following].max(axis=0)
            total += softmax(((x[own] - low) / (high - low)).std(axis=1, ddof=1))
        scores[own] = np.array([np.sum(total < value) for value in total]) / lag
    return scores


def expected_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, frequencies: np.ndarray, *, sinks: int, future: int, epsilon: float
) -> np.ndarray:
    """Scores the tokens after the sinks, and leaves 0 for the sinks; q and k are rotated to their positions."""
    n, G, H = q.shape

    def rotation(position: int) -> np.ndarray:
        matrix = np.zeros((H, H))
        for i, frequency in enumerate(frequencies.astype(np.float64)):
            j, angle = i + H // 2, position * frequency
            matrix[i, i] = matrix[j, j] = np.cos(angle)
            matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        return matrix

    ahead = np.mean([rotation(n + step) for step in range(future)], axis=0)
    total = np.zeros(n)
    for g in range(G):
        plain = np.array([rotation(t).T @ q[t, g] for t in range(sinks, n)])
        mean = ahead @ plain.mean(axis=0)
        covariance = ahead @ np.cov(plain.T, bias=True) @ ahead.T
        logits = [key @ mean / np.sqrt(H) + key @ covariance @ key / (2 * H) for key in k[sinks:].astype(np.float64)]
        total[sinks:] += softmax(np.array(logits)) / G
    return (total + epsilon) * np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=1))


def rest_kv(q: np.ndarray, k: np.ndarray, v: np.ndarray, scorer: ReSTKV) -> np.ndarray:
    """Leaves out one token after the other, and measures how far each of the last queries' outputs moves."""
    n, G, H = q.shape
    keys, values, total = k.astype(np.float64), v.astype(np.float64), np.zeros(n)
    past = max(n - scorer.observation_window, 0)
    for g in range(G):
        moves = np.zeros((n - past, n))
        for move, at in zip(moves, range(past, n), strict=True):
            weights, seen = softmax(keys[: at + 1] @ q[at, g] / np.sqrt(H)), values[: at + 1]
            for token in range(at + 1 if at else 0):  # the first query has no other token
                others = np.arange(at + 1) != token
                without = weights[others] @ seen[others] / weights[others].sum()
                move[token] = np.sqrt(np.sum((weights @ seen - without) ** 2))
        average = moves[0] if scorer.smoothing else moves.mean(axis=0)
        for move in moves[1:] if scorer.smoothing else ():
            average = scorer.smoothing * move + (1 - scorer.smoothing) * average
        total += average / G
    return np.concatenate([pool(total[:past], scorer.pooling, scorer.pooling_kernel), total[past:]])


def critical_kv(
    method: Method, votes: np.ndarray, v: np.ndarray, o: np.ndarray, lengths: Sequence[int], heavy: Sequence[int]
) -> np.ndarray:
    """Computes scores[B, K, T] by which the method's tokens come first: infinite ones for those of its first stage.

    votes[B, K, T] are SnapKV's, v[B, T, K, H] the values, o[N * H, D] the output projection, heavy[B] the budgets.
    """
    scorer, result = method.scorer, np.zeros(votes.shape)
    assert isinstance(scorer, CriticalKV)
    B, _, K, H = v.shape
    G = len(o) // H // K
    for b, head in np.ndindex(B, K):
        n = lengths[b]
        weights = votes[b, head] / (G * min(scorer.observation_window, n))
        for token in range(n):
            projected = [
                v[b, token, head].astype(np.float64) @ o[N * H : N * H + H] for N in range(head * G, head * G + G)
            ]
            norm = np.mean([np.abs(part).sum() for part in projected])
            result[b, head, token] = (weights[token] + scorer.epsilon) * norm
        recent = tokens_of(method.recent, n)
        middle = range(method.sinks, n - recent)
        first = sorted(middle, key=lambda token, weights=weights: (-weights[token], token))
        granted = min(heavy[b], len(middle))
        result[b, head, first[: int(granted * round(scorer.first_stage * 10000) / 10000)]] = np.inf
    return result


def turn(x: np.ndarray, steps: int, frequencies: np.ndarray) -> np.ndarray:
    """Rotates the channel pairs (i, i + H/2) of x[..., H], as complex numbers, by `steps` positions."""
    half = x.shape[-1] // 2
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * steps * frequencies.astype(np.float64))
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def prompt_scores(
    method: Method, q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: Sequence[int], frequencies: np.ndarray
) -> np.ndarray:
    """Computes the method's scores[B, K, T] of q[B, T, N, H], k and v[B, T, K, H]; zero in the padding."""
    B, T, N, _ = q.shape
    K = k.shape[2]
    scorer, scores = method.scorer, np.zeros((B, K, T))
    for b, head in np.ndindex(B, K):
        n = lengths[b]
        keys, values, group = k[b, :n, head], v[b, :n, head], slice(head * (N // K), (head + 1) * (N // K))
        if isinstance(scorer, TOVA):
            scores[b, head, :n] = tova(q[b, :n], k[b, :n])
        elif isinstance(scorer, LagKV):
            scores[b, head, :n] = lagkv(keys, values, sinks=method.sinks, lag=scorer.lag, padded=T)
        elif isinstance(scorer, ReSTKV):
            scores[b, head, :n] = rest_kv(q[b, :n, group], keys, values, scorer)
        elif isinstance(scorer, ExpectedAttention):
            settings = {"sinks": method.sinks, "future": scorer.future, "epsilon": scorer.epsilon}
            if n > method.sinks:
                scores[b, head, :n] = expected_attention(q[b, :n, group], keys, values, frequencies, **settings)
        else:
            scores[b, head, :n] = {KNorm: knorm, KeyDiff: keydiff}[type(scorer)](keys)
    return scores


# Quantisers: x[S, H], one packing block of one row and KV head -> the numbers that are read back ----


def hqq(x: np.ndarray, bits: int, group_size: int, axis: str, *, iterations: int = 20) -> np.ndarray:
    """Mean absolute error of HQQ's solver in each group (p = 0.7, beta = 10, growing by 1%), float32."""
    columns = x.T if axis == "tokens" else x
    errors = []
    for line in columns.astype(np.float32):
        for group in line.reshape(-1, group_size):
            scale = (group.max() - group.min()) / np.float32(2**bits - 1)
            zero, beta, least = group.min(), np.float32(10), np.inf
            for _ in range(iterations + 1):
                codes = np.clip(np.rint((group - zero) / scale), 0, 2**bits - 1)
                gap = group - codes * scale - zero
                least = min(least, np.abs(gap).mean())
                with np.errstate(divide="ignore"):
                    shrunk = np.sign(gap) * np.maximum(np.abs(gap) - np.abs(gap) ** np.float32(-0.3) / beta, 0)
                zero = (group - shrunk - codes * scale).mean(dtype=np.float32)
                beta *= np.float32(1.01)
            errors.append(least)
    return np.array(errors)


def turboquant(x: np.ndarray, levels: np.ndarray, metadata_dtype: type) -> np.ndarray:
    """Rounds each coordinate of the direction of an already rotated `x` to the nearest level."""
    result = np.zeros(x.shape)
    for s, token in enumerate(x.astype(np.float64)):
        norm = np.sqrt(token @ token)
        nearest = [levels[np.argmin(np.abs(levels - value / norm))] for value in token]
        result[s] = np.array(nearest) * np.float64(np.asarray(norm).astype(metadata_dtype))
    return result


def nvfp4(x: np.ndarray) -> np.ndarray:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    factor = np.abs(x).max() / np.float32(6 * 448)
    result = np.zeros(x.shape, np.float32)
    for s, h in np.ndindex(x.shape[0], x.shape[1] // 16):
        group = x[s, h * 16 : (h + 1) * 16]
        scale = np.float32((np.abs(group).max() / np.float32(6) / factor).astype(ml_dtypes.float8_e4m3fn)) * factor
        nearest = [values[np.argmin(np.abs(values - abs(value) / scale))] * np.sign(value) for value in group]
        result[s, h * 16 : (h + 1) * 16] = np.array(nearest) * scale
    return result


def fp8(x: np.ndarray, name: str) -> np.ndarray:
    dtype, largest = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}[name]
    return np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
