"""Tests the selection of tokens against the naive reference."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from oracle import naive

from minikv_jax.cache.capacity import kept_capacity
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.method import Method, Share, Tokens
from minikv_jax.ops.select import Kept, select

LENGTHS = np.array([1, 2, 3, 7, 19, 38, 39, 40])
TOKENS = 40
SCORED = Method(scorer=H2O(), heavy=0.25, recent=0.25)


@functools.partial(jax.jit, static_argnames=("method", "capacity", "window"))
def choose(
    scores: jax.Array, lengths: jax.Array, heavy: jax.Array, method: Method, capacity: int, window: int | None = None
) -> Kept:
    return select(scores, lengths, heavy, method, capacity, window)


@pytest.mark.parametrize(
    "method",
    [
        SCORED,
        dataclasses.replace(SCORED, heavy=0.33, recent=0.0, sinks=3),
        dataclasses.replace(SCORED, heavy=0.5, recent=0.5, sinks=2),
        dataclasses.replace(SCORED, heavy=5, recent=7, sinks=4),
        dataclasses.replace(SCORED, heavy=0.1, recent=1),
        dataclasses.replace(SCORED, heavy=100, recent=3),
        Method(recent=10, sinks=4),
        Method(recent=0.0, sinks=1),
        Method(),
    ],
    ids=lambda method: f"heavy{method.heavy}-recent{method.recent}-sinks{method.sinks}",
)
def test_matches_naive(method: Method):
    """Rows are ragged, with so few different scores that ties decide most choices."""
    shape = (len(LENGTHS), 3, TOKENS)
    scores = np.random.default_rng(0).integers(0, 4, shape).astype(np.float32)
    capacity = kept_capacity(method, method.heavy, TOKENS)
    heavy = method.heavy.tokens(jnp.asarray(LENGTHS))
    kept = choose(jnp.asarray(scores), jnp.asarray(LENGTHS), heavy, method, capacity)
    assert kept.positions.shape[-1] == capacity <= TOKENS
    for b, length in enumerate(LENGTHS.tolist()):
        for head in range(shape[1]):
            want = naive.kept_positions(
                scores[b, head],
                length,
                sinks=method.sinks,
                heavy=naive.tokens_of(method.heavy, length),
                recent=naive.tokens_of(method.recent, length),
            )
            assert kept.tokens[b] == len(want)
            filler = [TOKENS] * (capacity - len(want))
            np.testing.assert_array_equal(kept.positions[b, head], want + filler)
    # The padding's contents do not matter.
    poisoned = np.where(np.arange(TOKENS) < LENGTHS[:, None, None], scores, np.nan)
    again = choose(jnp.asarray(poisoned), jnp.asarray(LENGTHS), heavy, method, capacity)
    np.testing.assert_array_equal(again.positions, kept.positions)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=40, database=None)
@hypothesis.given(data=strategies.data(), length=strategies.integers(1, TOKENS), heavy=strategies.integers(0, TOKENS))
def test_any_scores_choose_as_naive_does(data: strategies.DataObject, length: int, heavy: int):
    """Scores have any size and sign, or are infinite or equal; the heavy budget may exceed the row."""
    values = strategies.floats(width=32, allow_nan=False, allow_subnormal=False)
    # XLA flushes subnormal numbers to zero; the largest and infinite scores are equal.
    finite = np.finfo(np.float32)
    row = data.draw(strategies.lists(values, min_size=TOKENS, max_size=TOKENS))
    scores = np.clip(np.array(row, np.float32), finite.min, finite.max)
    method = dataclasses.replace(SCORED, heavy=Tokens(TOKENS), recent=5, sinks=2)
    kept = choose(jnp.array([[row]], jnp.float32), jnp.array([length]), jnp.array([heavy]), method, TOKENS)
    want = naive.kept_positions(scores, length, sinks=2, heavy=heavy, recent=5)
    assert kept.positions[0, 0, : len(want)].tolist() == want
    assert (kept.positions[0, 0, len(want) :] == TOKENS).all()
    assert kept.tokens.tolist() == [len(want)]


def test_scores_that_are_not_finite_displace_nothing():
    """Sinks and newest tokens stay whatever the scores; NaN is the lowest score, as is minus infinity."""
    scores = np.zeros((1, 4, TOKENS), np.float32)
    scores[0, 0] = np.nan
    scores[0, 1] = np.inf
    scores[0, 2] = -np.inf
    scores[0, 3, ::2] = np.nan
    method = dataclasses.replace(SCORED, heavy=3, recent=4, sinks=2)
    length, heavy = jnp.array([TOKENS - 5]), jnp.array([3])
    kept = choose(jnp.asarray(scores), length, heavy, method, kept_capacity(method, method.heavy, TOKENS))
    newest = list(range(TOKENS - 9, TOKENS - 5))
    assert kept.positions[0, :3].tolist() == [[0, 1, 2, 3, 4, *newest]] * 3
    assert kept.positions[0, 3].tolist() == [0, 1, 3, 5, 7, *newest]
    # Also in a window: tokens that the next one does not see do not count as those with the lowest score.
    first = TOKENS - 5 - 19
    kept = choose(jnp.asarray(scores), length, heavy, method, 7, window=20)
    assert kept.positions[0, 2].tolist() == [first, first + 1, first + 2, *newest]


def test_sliding_window():
    """Only the last `window - 1` tokens are kept, because the next token sees `window` with itself."""
    window, method = 10, dataclasses.replace(SCORED, heavy=3, recent=4, sinks=2)
    scores = np.random.default_rng(1).integers(0, 4, (len(LENGTHS), 2, TOKENS)).astype(np.float32)
    capacity = kept_capacity(method, method.heavy, TOKENS, window)
    lengths = jnp.asarray(LENGTHS)
    kept = choose(jnp.asarray(scores), lengths, jnp.full_like(lengths, 3), method, capacity, window)
    assert capacity == window - 1
    for b, length in enumerate(LENGTHS.tolist()):
        first = max(length - window + 1, 0)
        for head in range(2):
            sinks = max(method.sinks - first, 0)
            want = naive.kept_positions(scores[b, head, first:], length - first, sinks=sinks, heavy=3, recent=4)
            got = np.asarray(kept.positions[b, head])
            assert [first + position for position in want] == got[: kept.tokens[b]].tolist()


class Halves(H2O):
    """Scorer whose own scores choose half of the heavy budget."""

    @property
    def first_share(self) -> float:
        return 0.5


@pytest.mark.parametrize("window", [None, 12])
def test_second_scores_choose_the_rest_of_the_heavy_budget(window: int | None):
    """Ties and NaN in both stages; a row shorter than its budgets keeps everything."""
    method, heavy = Method(scorer=Halves(), heavy=7, recent=4, sinks=2), 7
    rng, shape = np.random.default_rng(3), (len(LENGTHS), 2, TOKENS)
    first, second = (rng.integers(0, 6, shape).astype(np.float32) for _ in range(2))
    second[:, :, 5] = np.nan
    capacity = kept_capacity(method, method.heavy, TOKENS, window)
    lengths = jnp.asarray(LENGTHS)
    both = jax.jit(functools.partial(select, method=method, capacity=capacity, window=window))
    kept = both(first, lengths, jnp.full_like(lengths, heavy), second=second)
    second = np.nan_to_num(second, nan=-1)
    for b, length in enumerate(LENGTHS.tolist()):
        start = 0 if window is None else max(length - window + 1, 0)
        sinks, recent = min(max(2 - start, 0), length - start), min(4, length - start - max(2 - start, 0))
        middle = range(start + sinks, length - max(recent, 0))
        count = min(heavy, len(middle))
        for head in range(2):
            order = sorted(middle, key=lambda token, row=first[b, head]: (-row[token], token))
            chosen, left = order[: count // 2], sorted(order[count // 2 :])
            chosen += sorted(left, key=lambda token, row=second[b, head]: (-row[token], token))[: count - count // 2]
            want = sorted({*range(start, length)} - {*middle} | {*chosen})
            assert np.asarray(kept.positions)[b, head, : kept.tokens[b]].tolist() == want


@pytest.mark.parametrize("method", [Method(), Method(recent=Share(1.0), sinks=3)])
def test_without_eviction_every_token_is_kept_in_order(method: Method):
    lengths = jnp.asarray(LENGTHS)
    kept = select(jnp.zeros((len(LENGTHS), 2, TOKENS)), lengths, jnp.zeros_like(lengths), method, TOKENS)
    np.testing.assert_array_equal(kept.tokens, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        assert kept.positions[b].tolist() == [[*range(length), *[TOKENS] * (TOKENS - length)]] * 2
