"""A slow, obvious NumPy version of everything the library does to a KV cache, with dense maps and Python loops.

It follows docs/packed-layout.md, one row and one KV head at a time, without JAX. Shape letters are those of
docs/architecture.md; B and K are loops here, and `n` is the length of one row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from oracle import layout

from minikv_jax.methods.base import NoScores, Uniform
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Amount, Method, Share, Tokens
from minikv_jax.methods.minikv import Variance
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.twin import Twin

# Attention ----------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def causal_map(q: np.ndarray, k: np.ndarray, scale: float, window: int | None = None) -> np.ndarray:
    """Computes the softmax map [n, n] of one head's q and k [n, H] in float64."""
    n = len(q)
    result = np.zeros((n, n))
    for t in range(n):
        first = 0 if window is None else max(0, t - window + 1)
        result[t, first : t + 1] = softmax(k[first : t + 1].astype(np.float64) @ q[t].astype(np.float64) * scale)
    return result


def prefill_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes out[B,T,N,H] and column sums[B,K,T] from q[B,T,N,H], k and v[B,T,K,H]; zero in the padding."""
    B, T, N, H = q.shape
    K = k.shape[2]
    scale = float(H**-0.5) if scale is None else scale
    out, scores = np.zeros((B, T, N, H)), np.zeros((B, K, T))
    for b, n in enumerate(lengths):
        for head in range(N):
            kv_head = head // (N // K)
            attention = causal_map(q[b, :n, head], k[b, :n, kv_head], scale, window)
            out[b, :n, head] = attention @ v[b, :n, kv_head].astype(np.float64)
            scores[b, kv_head, :n] += attention.sum(axis=0)
    return out, scores


def window_scores(
    q: np.ndarray,
    k: np.ndarray,
    lengths: Sequence[int],
    *,
    observation_window: int,
    pooling: str,
    pooling_kernel: int,
    window: int | None = None,
    pools_window: bool = False,
) -> np.ndarray:
    """Computes SnapKV's votes[B,K,T]: the map's last rows, summed over queries and heads and pooled over tokens.

    `pools_window` says whether the tokens of the observation window are pooled too.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    scores = np.zeros((B, K, T))
    for b, n in enumerate(lengths):
        for head in range(N):
            kv_head = head // (N // K)
            attention = causal_map(q[b, :n, head], k[b, :n, kv_head], H**-0.5, window)
            scores[b, kv_head, :n] += attention[max(0, n - observation_window) :].sum(axis=0)
        pooled = n if pools_window else max(0, n - observation_window)
        for kv_head in range(K):
            scores[b, kv_head, :pooled] = pool(scores[b, kv_head, :pooled], pooling, pooling_kernel)
    return scores


def twin_window_scores(q: np.ndarray, k: np.ndarray, lengths: Sequence[int], scorer: Twin) -> np.ndarray:
    """Computes minus the better of two ranks: by the short window's pooled votes, by the long window's plain votes."""
    windows = [(scorer.observation_window, scorer.pooling, scorer.pooling_kernel), (scorer.long_window, "max", 1)]
    places = np.zeros((2, *k.shape[:1], k.shape[2], k.shape[1]))
    for i, (size, pooling, kernel) in enumerate(windows):
        how = {"observation_window": size, "pooling": pooling, "pooling_kernel": kernel}
        votes = window_scores(q, k, lengths, **how, pools_window=True)
        for row, head in np.ndindex(votes.shape[:2]):
            order = sorted(range(votes.shape[2]), key=lambda token: (-votes[row, head, token], token))
            places[i, row, head, order] = range(len(order))
    return -np.minimum(*places)


def pool(votes: np.ndarray, pooling: str, kernel: int) -> np.ndarray:
    """Pools with stride 1 to the same length; "mean" counts positions outside as zeros, "max" ignores them."""
    result = np.zeros_like(votes)
    for i in range(len(votes)):
        near = votes[max(0, i - kernel // 2) : i + kernel // 2 + 1]
        result[i] = near.max() if pooling == "max" else near.sum() / kernel
    return result


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Computes the attention of one query q[H] over all keys and values[S, H] in float64."""
    scale = float(len(q) ** -0.5) if scale is None else scale
    return softmax(keys.astype(np.float64) @ q.astype(np.float64) * scale) @ values.astype(np.float64)


# Selection ----------------------------------------------------------------------------------------


def tokens_of(budget: Amount, length: int) -> int:
    """Tokens of a budget, at most the length. A share is resolved to 1/10000 and rounded down in integers."""
    return min(budget.count, length) if isinstance(budget, Tokens) else length * round(budget.fraction * 10000) // 10000


def kept_positions(scores: np.ndarray, length: int, *, sinks: int, heavy: int, recent: int) -> list[int]:
    """Ascending positions that one row and KV head keeps of the first `length` tokens."""
    sinks = min(sinks, length)
    recent = min(recent, length - sinks)
    heavy = min(heavy, length - sinks - recent)
    middle = range(sinks, length - recent)
    top = sorted(middle, key=lambda position: (-scores[position], position))[:heavy]
    return [*range(sinks), *sorted(top), *range(length - recent, length)]


def layer_shares(method: Method, layers: int) -> list[int]:
    """Each layer's heavy budget, in 1/10000 of the prompt or in tokens, in exact rational arithmetic."""
    counted = isinstance(method.heavy, Tokens)
    mean = method.heavy.count if isinstance(method.heavy, Tokens) else round(method.heavy.fraction * 10000)
    if isinstance(method.budget, Uniform) or layers == 1:
        return [mean] * layers
    assert isinstance(method.budget, Pyramid)
    last = Fraction(mean) / Fraction(method.budget.beta)
    first = 2 * mean - last
    wanted = [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
    recent = round(method.recent.fraction * 10000) if isinstance(method.recent, Share) else 0
    exact = share_out(wanted, mean * layers, mean * layers if counted else 10000 - recent)
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(layers), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: round(sum(exact)) - sum(shares)]:
        shares[i] += 1
    return shares


def share_out(weights: Sequence, total, most) -> list:
    """Divides `total` in proportion to `weights`, at most `most` each; the others share the excess in proportion."""
    capped: set[int] = set()
    while len(capped) < len(weights):
        free = sum(weight for i, weight in enumerate(weights) if i not in capped)
        left = total - most * len(capped)
        over = {i for i, weight in enumerate(weights) if i not in capped and left * weight > most * free}
        if not over:
            return [most if i in capped else left * weight / free for i, weight in enumerate(weights)]
        capped |= over
    return [most] * len(weights)


def heavy_tokens(method: Method, scores: Sequence[np.ndarray], lengths: Sequence[int]) -> list[list[int]]:
    """Number of top-scored tokens granted to each layer and row, from each layer's scores[B, K, T]."""
    if not isinstance(method.budget, Variance):
        shares = layer_shares(method, len(scores))
        if isinstance(method.heavy, Tokens):
            return [[share] * len(lengths) for share in shares]
        return [[n * share // 10000 for n in lengths] for share in shares]
    counts = [[0] * len(lengths) for _ in scores]
    for b, n in enumerate(lengths):
        weights = [np.mean([1 / (1 + np.var(head[:n] / head[:n].mean())) for head in layer[b]]) for layer in scores]
        if isinstance(method.heavy, Tokens):
            limit: Amount = Tokens(int(method.heavy.count * method.budget.cap))
        else:
            recent = method.recent.fraction if isinstance(method.recent, Share) else 0.0
            limit = Share(min(method.heavy.fraction * method.budget.cap, 1 - recent))
        granted = share_out(weights, len(scores) * tokens_of(method.heavy, n), tokens_of(limit, n))
        for layer, value in enumerate(granted):
            counts[layer][b] = math.floor(value + 1e-6)
    return counts


def prompt_scores(method: Method, q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Computes the method's scores[B, K, T] of a prompt."""
    scorer = method.scorer
    if isinstance(scorer, H2O):
        return prefill_attention(q, k, v, lengths)[1]
    if isinstance(scorer, Twin):
        return twin_window_scores(q, k, lengths, scorer)
    if isinstance(scorer, SnapKV):
        return window_scores(
            q,
            k,
            lengths,
            observation_window=scorer.observation_window,
            pooling=scorer.pooling,
            pooling_kernel=scorer.pooling_kernel,
        )
    assert isinstance(scorer, NoScores)
    return np.zeros((k.shape[0], k.shape[2], k.shape[1]))


# Quantisation: the layout is `layout.quantize` ----------------------------------------------------


def packing_block(quantizer: MinMax) -> int:
    """Number of tokens that enter the packed region together."""
    return max(layout.packing_block(bits, quantizer.group_size) for bits in (quantizer.k_bits, quantizer.v_bits))


# One row and one KV head of a layer's cache -------------------------------------------------------


@dataclasses.dataclass
class HeadCache:
    """Cache of one row and KV head: quantised blocks, and full-precision tokens (sinks first, then by age)."""

    method: Method
    head_dim: int
    packed_k: list[layout.Packed] = dataclasses.field(default_factory=list)
    packed_v: list[layout.Packed] = dataclasses.field(default_factory=list)
    tail: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    rounded: tuple[int, int] = (0, 0)  # keys and values after the sinks that the "kivi" rule has quantised

    @classmethod
    def compress(cls, method: Method, k: np.ndarray, v: np.ndarray, positions: Sequence[int]) -> HeadCache:
        """Compresses a prompt's k and v[n, H]; `positions` are the kept ones, sinks first."""
        cache = cls(method, k.shape[1], tail=[(k[position], v[position]) for position in positions])
        if method.quantizer is None:
            return cache
        block = packing_block(cache.quantizer)
        not_sinks = max(len(positions) - method.sinks, 0)
        stay = not_sinks % block
        if method.tail.rule == "kivi":
            stay = not_sinks - max(not_sinks - method.tail.length, 0) // block * block
        while len(cache.tail) > method.sinks + stay:
            cache.pack_oldest(block)
        cache.round_tail()
        return cache

    @property
    def quantizer(self) -> MinMax:
        assert isinstance(self.method.quantizer, MinMax)
        return self.method.quantizer

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Appends k and v[H] of a generated token."""
        self.tail.append((k, v))
        method = self.method
        if method.quantizer is None:
            return
        if method.tail.rule == "minikv" and len(self.tail) == method.sinks + method.tail.length:
            self.pack_oldest(method.tail.length)
        elif method.tail.rule == "kivi":
            self.round_tail()
            block = packing_block(self.quantizer)
            if len(self.tail) == method.sinks + method.tail.length + block:
                self.pack_oldest(block)

    def round_tail(self) -> None:
        """In the "kivi" rule, keys before the last full run and values before the newest `length` become rounded."""
        method, length = self.method, self.method.tail.length
        if method.tail.rule != "kivi":
            return
        packed = sum(len(x.codes) for x in self.packed_k)
        seen = packed + len(self.tail) - method.sinks
        due = max(seen - 1, 0) // length * length, max(seen - length, 0)
        block, quantizer = packing_block(self.quantizer), self.quantizer
        kinds = ((quantizer.k_bits, "tokens"), (quantizer.v_bits, "channels"))
        for kind, (bits, axis) in enumerate(kinds):
            for start in range(packed, due[kind], block):
                slots = range(method.sinks + start - packed, method.sinks + start - packed + block)
                x = np.stack([self.tail[slot][kind] for slot in slots])
                x = layout.quantize(x, bits, quantizer.group_size, axis, quantizer.metadata_dtype, block).dequantize()
                for slot, value in zip(slots, x.astype(self.tail[0][0].dtype), strict=True):
                    if self.rounded[kind] <= packed + slot - method.sinks < due[kind]:
                        k, v = self.tail[slot]
                        self.tail[slot] = (value, v) if kind == 0 else (k, value)
        self.rounded = due

    def adopt(self, kind: int, tail: np.ndarray) -> None:
        """Takes the keys (`kind` 0) or values (1) of the tail from an array."""
        self.tail = [(x, v) if kind == 0 else (k, x) for (k, v), x in zip(self.tail, tail, strict=False)]

    def pack_oldest(self, count: int) -> None:
        sinks, quantizer, block = self.method.sinks, self.quantizer, packing_block(self.quantizer)
        assert count % block == 0
        for _ in range(count // block):
            chosen = self.tail[sinks : sinks + block]
            del self.tail[sinks : sinks + block]
            keys, values = (np.stack(tokens) for tokens in zip(*chosen, strict=True))
            shared = quantizer.metadata_dtype, block
            group_size = quantizer.group_size
            self.packed_k.append(layout.quantize(keys, quantizer.k_bits, group_size, "tokens", *shared))
            self.packed_v.append(layout.quantize(values, quantizer.v_bits, group_size, "channels", *shared))

    def keys(self) -> np.ndarray:
        """Float32 keys [S, H] that a query sees, quantised or not."""
        tail = np.array([k for k, _ in self.tail], np.float32).reshape(-1, self.head_dim)
        return np.concatenate([*(x.dequantize() for x in self.packed_k), tail])

    def values(self) -> np.ndarray:
        tail = np.array([v for _, v in self.tail], np.float32).reshape(-1, self.head_dim)
        return np.concatenate([*(x.dequantize() for x in self.packed_v), tail])
