"""Tests turned queries and the scorer that uses them against NumPy, on ragged rows with NaN in the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.naive_methods import turn

from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.foresight import Foresight
from minikv_jax.methods.turned import turned_votes
from minikv_jax.ops.window_votes import window_votes

LENGTHS, T, H, GROUP = [40, 33, 5], 40, 16, 2
FREQUENCIES = np.geomspace(1.0, 1e-3, H // 2).astype(np.float32)


def naive_votes(q: np.ndarray, k: np.ndarray, count: int, ahead: int, window: int | None) -> np.ndarray:
    """Sum of squared weights of `count` turned queries over `k[n, H]`, the keys of `q[n, G, H]`."""
    n, votes = len(k), np.zeros(len(k))
    for number in range(count):
        at = n - 1 - number * n // count
        for head in range(q.shape[1]):
            weights = np.exp(k.astype(np.float64) @ turn(q[at, head], n + ahead - at, FREQUENCIES) / np.sqrt(H))
            if window is not None:
                weights *= np.arange(n) > n + ahead - window
            votes += (weights / max(weights.sum(), 1e-300)) ** 2
    return votes


def prompt() -> LayerInputs:
    rng = np.random.default_rng(7)
    q, k, v = (rng.normal(size=(3, T, heads, H)).astype(np.float32) for heads in (2 * GROUP, 2, 2))
    for x in (q, k, v):
        x[np.arange(T) >= np.array(LENGTHS)[:, None]] = np.nan
    lengths, frequencies = jnp.asarray(LENGTHS), jnp.asarray(FREQUENCIES)
    return LayerInputs(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), lengths, frequencies=frequencies)


@pytest.mark.parametrize(("count", "ahead", "window"), [(1, 0, None), (7, 3, None), (33, 16, None), (5, 2, 20)])
def test_turned_votes_are_the_naive_ones(count: int, ahead: int, window: int | None):
    inputs = prompt()
    run = jax.jit(lambda inputs: turned_votes(inputs._replace(window=window), count, ahead, power=2))
    got = np.asarray(run(inputs._replace(layer=jnp.int32(0))))
    q, k = np.asarray(inputs.q), np.asarray(inputs.k)
    for row, n in enumerate(LENGTHS):
        for head in range(2):
            want = naive_votes(q[row, :n, GROUP * head : GROUP * (head + 1)], k[row, :n, head], count, ahead, window)
            # Angles of up to 56 radians carry 2**-24 of themselves, and logits have size ~4.
            np.testing.assert_allclose(got[row, head, :n], want, rtol=1e-4, atol=1e-5)
            assert not got[row, head, n:].any()


@pytest.mark.parametrize("kernel", [1, 5])
def test_foresight_is_the_best_of_three_ranks(kernel: int):
    inputs, scorer = prompt(), Foresight(newest=2, pooling_kernel=kernel, observation_window=9, turned=6, ahead=1)
    of_last = window_votes(inputs.q, inputs.k, inputs.lengths, scorer.vote_windows, power=2)
    got = np.asarray(scorer.score(inputs._replace(votes=of_last)))
    votes = [np.array(x) for x in (*of_last, turned_votes(inputs, 6, 1, 2))]
    plain, reach = votes[0].copy(), kernel // 2
    for row, n in enumerate(LENGTHS):
        for head in range(2):
            for at in range(n):
                votes[0][row, head, at] = plain[row, head, max(at - reach, 0) : min(at + reach + 1, n)].max()
            ranks = [np.argsort(np.argsort(-np.asarray(vote)[row, head, :n], kind="stable")) for vote in votes]
            np.testing.assert_array_equal(got[row, head, :n], -np.min(ranks, axis=0))


def test_foresight_needs_the_rotation():
    x = jnp.zeros((1, 8, 2, H))
    with pytest.raises(ValueError, match="need the rotary frequencies"):
        Foresight().score(LayerInputs(x, x, x, jnp.array([8])))


def test_an_even_pooling_kernel_is_refused():
    with pytest.raises(ValueError, match="pooling_kernel=4: expected an odd number"):
        Foresight(pooling_kernel=4)
