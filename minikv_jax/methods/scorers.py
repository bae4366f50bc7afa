"""How the tokens of a prompt are scored, per layer, row and KV head: higher is kept first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from minikv_jax.methods.base import ScorerInputs, register_scorer
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.rotary import rotate


@register_scorer("none")
def no_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """All tokens score alike: position alone decides (StreamingLLM, or no eviction at all)."""
    del config
    batch, tokens, kv_heads, _ = inputs.k.shape
    return jnp.zeros((batch, kv_heads, tokens), jnp.float32)


def _add(scores: Float[Array, "B K C"], weights: Float[Array, "B K C"], config: CacheConfig) -> Array:
    """A column sum with the row of one more query."""
    del config
    return scores + weights


@register_scorer("cumulative", needs_column_sums=True, update=_add)
def cumulative_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Column sums of the causal softmax map over all queries of the KV head's group (H2O eq. 2; MiniKV section 3.1)."""
    del config
    assert inputs.column_sums is not None
    return inputs.column_sums


@register_scorer("window")
def window_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Votes of the last `observation_window` queries, pooled along tokens (SnapKV section 4).

    All tokens are pooled. SnapKV's own code pools those before the window alone, so that there no vote for a key of the
    window reaches the few tokens just before it.
    """
    return _pool(_window_votes(inputs, config.observation_window), inputs.lengths, config)


@register_scorer("twin-window", long_window=256)
def twin_window_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """The better of a token's ranks under two votes, negated: each vote has its first choices kept.

    One is SnapKV's, of the last `observation_window` queries, pooled: whole passages that the end of the prompt, often
    a question, asks for. The other is of the last `long_window` queries, not pooled: single tokens that the text keeps
    coming back to, which a few queries do not show. Ranks, unlike a sum, cannot let one vote drown the other.
    """
    short = window_scores(inputs, config)
    long = _window_votes(inputs, config.option("long_window"))
    return -jnp.minimum(_rank(short), _rank(long)).astype(jnp.float32)


def _rank(scores: Float[Array, "B K T"]) -> Array:
    """0 for the highest score of a row and KV head; equal scores in order of position."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)


def _pool(votes: Float[Array, "B K T"], lengths: Array, config: CacheConfig) -> Float[Array, "B K T"]:
    valid = jnp.arange(votes.shape[-1]) < lengths[:, None, None]
    reach = config.pooling_kernel // 2
    dims, padding = (1, 1, config.pooling_kernel), ((0, 0), (0, 0), (reach, reach))
    if config.pooling == "max":
        votes = jnp.where(valid, votes, -jnp.inf)
        pooled = lax.reduce_window(votes, -jnp.inf, lax.max, dims, (1, 1, 1), padding)
    else:
        votes = jnp.where(valid, votes, 0.0)
        pooled = lax.reduce_window(votes, 0.0, lax.add, dims, (1, 1, 1), padding) / config.pooling_kernel
    return jnp.where(valid, pooled, 0.0)


_VOTERS = 32  # queries whose weights over all keys are held at a time


def _window_votes(inputs: ScorerInputs, size: int) -> Float[Array, "B K T"]:
    """Column sums of the softmax map over each row's last `size` queries; zero in the padding."""
    q, k, lengths, window = inputs.q, inputs.k, inputs.lengths, inputs.window
    batch, tokens, heads, dim = q.shape
    kv_heads, keys = k.shape[2], jnp.arange(tokens)
    voters = min(size, _VOTERS)

    def add(block: Array | int, votes: Array) -> Array:
        back = block * voters + jnp.arange(voters)  # 0 is the row's last query
        positions = jnp.where(back < size, lengths[:, None] - 1 - back, -1)  # [B, w], -1 and below: no such query
        rows = jnp.take_along_axis(q, jnp.maximum(positions, 0)[:, :, None, None], axis=1)
        rows = rows.reshape(batch, voters, kv_heads, heads // kv_heads, dim)
        logits = jnp.einsum("bwkgh,bskh->bkgws", rows, k, preferred_element_type=jnp.float32, precision="highest")
        seen = keys <= positions[:, :, None]  # [B, w, T]
        if window is not None:
            seen &= keys > positions[:, :, None] - window
        logits = jnp.where(seen[:, None, None], logits * dim**-0.5, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return votes + jnp.sum(weights / jnp.where(total == 0, 1.0, total), axis=(2, 3))

    votes = jnp.zeros((batch, kv_heads, tokens), jnp.float32)
    return add(0, votes) if size == voters else lax.fori_loop(0, -(-size // voters), add, votes)


def _mean_over_heads(scores: Float[Array, "B K C"], weights: Float[Array, "B K C"], config: CacheConfig) -> Array:
    """The newest query's weights alone; the same for all KV heads."""
    del scores, config
    return jnp.broadcast_to(jnp.mean(weights, axis=1, keepdims=True), weights.shape)


@register_scorer("tova", update=_mean_over_heads)
def tova_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Weights of the last query, averaged over all heads: every KV head keeps the same tokens (TOVA section 3.2)."""
    del config
    votes = _window_votes(inputs, 1)
    heads = inputs.q.shape[2]
    return jnp.broadcast_to(jnp.sum(votes, axis=1, keepdims=True) / heads, votes.shape)


@register_scorer("knorm")
def norm_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Keys of small L2 norm first (Devoto et al. 2024, arXiv 2406.11430, section 3)."""
    del config
    return -jnp.linalg.norm(inputs.k.astype(jnp.float32), axis=-1).swapaxes(1, 2)


@register_scorer("keydiff")
def key_difference_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """Keys unlike the row's mean direction first: minus the cosine with the mean of unit keys (KeyDiff section 3)."""
    del config
    keys = inputs.k.astype(jnp.float32)
    valid = jnp.arange(keys.shape[1]) < inputs.lengths[:, None]
    unit = jnp.where(valid[..., None, None], _unit(keys), 0.0)
    anchor = _unit(jnp.sum(unit, axis=1))  # the mean's direction, [B, K, H]
    return -jnp.einsum("btkh,bkh->bkt", unit, anchor, precision="highest")


def _unit(x: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1.0, norm)


@register_scorer("lagkv", lag=128)
def lag_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """How keys and values spread against the range of the tokens that follow them (LagKV section 2.2).

    After the sinks, tokens form partitions of `lag`. A token is scaled per channel to the least and largest value of
    the next partition; its score is the softmax, over the partition, of the standard deviation over channels, the mean
    of keys and values. Only the rank inside the partition counts, so that each partition keeps as many. Tokens without
    a whole partition after theirs come before all others, the newest first.
    """
    lag, sinks, tokens = config.option("lag"), config.sinks, inputs.k.shape[1]
    count = max(-(-(tokens - sinks) // lag), 1)

    def parts(x: Array) -> Array:
        """`[B, K, partitions, lag, H]`, zeros after the end."""
        x = x[:, sinks : sinks + count * lag].astype(jnp.float32)
        x = jnp.pad(x, [(0, 0), (0, count * lag - x.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], count, lag, -1)

    def spread(x: Array) -> Array:
        low, high = x.min(axis=3, keepdims=True), x.max(axis=3, keepdims=True)
        low, high = jnp.roll(low, -1, axis=2), jnp.roll(high, -1, axis=2)
        scaled = (x - low) / jnp.where(high == low, 1.0, high - low)
        return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)

    score = (spread(parts(inputs.k)) + spread(parts(inputs.v))) / 2
    rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1) / lag  # [B, K, partitions, lag], in [0, 1)
    rank = rank.reshape(*rank.shape[:2], -1)[:, :, : max(tokens - sinks, 0)]
    rank = jnp.pad(rank, [(0, 0), (0, 0), (tokens - rank.shape[2], 0)])
    positions = jnp.arange(tokens)
    partition = (positions - sinks) // lag
    has_next = (positions >= sinks) & (sinks + (partition + 2) * lag <= inputs.lengths[:, None])  # [B, T]
    return jnp.where(has_next[:, None], rank, 1 + positions / tokens)


@register_scorer("expected-attention", future=512, epsilon=0.0)
def expected_scores(inputs: ScorerInputs, config: CacheConfig) -> Float[Array, "B K T"]:
    """The attention expected of the next `future` queries (Expected Attention, arXiv 2510.00636, section 3).

    Queries before RoPE, the sinks' left out, are taken as normal with their mean and covariance, and turned by the mean
    rotation `R` of the positions to come: `E[exp(q k / sqrt(H))] = exp(Rm k / sqrt(H) + k RCR' k / 2H)`. This is
    normalised over the keys after the sinks, averaged over the KV head's query heads, and `+ epsilon` times the norm of
    the value (the paper's norm is of `W_o v`, which a cache does not know).
    """
    q, k, v, lengths, frequencies = inputs.q, inputs.k, inputs.v, inputs.lengths, inputs.frequencies
    if frequencies is None:
        raise ValueError("scorer='expected-attention' needs the rotary frequencies")
    batch, tokens, _, dim = q.shape
    kv_heads = k.shape[2]
    positions = jnp.arange(tokens)
    used = (positions >= config.sinks) & (positions < lengths[:, None])  # [B, T]
    count = jnp.maximum(jnp.sum(used, axis=1), 1)[:, None, None]
    angles = positions[:, None] * frequencies
    plain = rotate(q.astype(jnp.float32), jnp.cos(angles)[None], -jnp.sin(angles)[None])
    plain = jnp.where(used[..., None, None], plain, 0.0)
    mean = jnp.sum(plain, axis=1) / count  # [B, N, H]
    centred = jnp.where(used[..., None, None], plain - mean[:, None], 0.0)
    covariance = jnp.einsum("btni,btnj->bnij", centred, centred, precision="highest") / count[..., None]

    ahead = (lengths[:, None] + jnp.arange(config.option("future")))[..., None] * frequencies  # [B, future, H/2]
    turn = lambda x: rotate(x, *(jnp.mean(f(ahead), axis=1, keepdims=True) for f in (jnp.cos, jnp.sin)))  # noqa: E731
    mean = turn(mean[:, None])[:, 0].reshape(batch, kv_heads, -1, dim)
    flat = turn(covariance.swapaxes(2, 3).reshape(batch, 1, -1, dim))  # rows, then columns
    flat = flat.reshape(covariance.shape).swapaxes(2, 3)
    covariance = turn(flat.reshape(batch, 1, -1, dim)).reshape(batch, kv_heads, -1, dim, dim)

    keys = k.astype(jnp.float32)
    spread = jnp.einsum("btki,bkgij->btkgj", keys, covariance, precision="highest")
    logits = jnp.einsum("btkh,bkgh->bkgt", keys, mean, precision="highest") * dim**-0.5
    logits += jnp.einsum("btkgh,btkh->bkgt", spread, keys, precision="highest") / (2 * dim)
    weights = jax.nn.softmax(jnp.where(used[:, None, None], logits, -jnp.inf), axis=-1, where=used[:, None, None])
    norms = jnp.linalg.norm(v.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    return (jnp.mean(weights, axis=2) + config.option("epsilon")) * norms
