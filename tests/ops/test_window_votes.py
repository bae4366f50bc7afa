"""Tests the votes of the last queries against a dense float64 softmax map, and their ranks against two sorts."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.layers import assert_close, normal, poison

from minikv_jax import meshes
from minikv_jax.methods.votes import ranks
from minikv_jax.models.windows import Chunk
from minikv_jax.ops.window_votes import window_votes

VOTES = jax.jit(window_votes, static_argnames=("sizes", "power", "soft_cap", "window", "implementation"))
T, H = 70, 16
LENGTHS = np.array([0, 1, 33, 69, 70])


def prompt(heads: tuple[int, int], dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k = (normal(rng, len(LENGTHS), T, count, H) for count in heads)
    poison(LENGTHS, q, k)
    return q.astype(dtype), k.astype(dtype)


def naive(q: np.ndarray, k: np.ndarray, size: int, power: int, window: int | None) -> np.ndarray:
    """Sums the weights query by query."""
    group = q.shape[2] // k.shape[2]
    out = np.zeros((len(LENGTHS), k.shape[2], T))
    for row, length in enumerate(LENGTHS):
        for query in range(max(length - size, 0), length):
            first = 0 if window is None else max(query - window + 1, 0)
            for head in range(q.shape[2]):
                keys = k[row, first : query + 1, head // group].astype(np.float64)
                weights = np.exp(keys @ q[row, query, head].astype(np.float64) / np.sqrt(H))
                out[row, head // group, first : query + 1] += (weights / weights.sum()) ** power
    return out


@pytest.mark.parametrize(
    ("sizes", "heads", "power", "window"),
    [
        ((5, 50), (4, 2), 1, None),
        ((50, 5, 5), (3, 1), 1, None),
        ((1,), (4, 4), 1, 9),
        ((32, 33, 1000), (8, 2), 2, None),
        ((64, 70), (2, 2), 3, 40),
    ],
)
def test_votes_match_naive(sizes: tuple[int, ...], heads: tuple[int, int], power: int, window: int | None):
    """Nested windows in any order, some larger than a row, with NaN in the padding."""
    q, k = prompt(heads)
    votes = VOTES(q, k, LENGTHS, sizes, power=power, window=window)
    for size, got in zip(sizes, votes, strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, naive(q, k, size, power, window))
    again = VOTES(q, k, LENGTHS, sizes, power=power, window=window)
    jax.tree.map(np.testing.assert_array_equal, again, votes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_votes_in_16_bits(dtype: type):
    q, k = prompt((4, 2), dtype)
    (votes,) = VOTES(q, k, LENGTHS, (40,))
    assert_close(votes, naive(q, k, 40, 1, None))  # products and sums are float32


def test_votes_on_a_mesh():
    q, k = (x[1:] for x in prompt((4, 2)))
    with jax.set_mesh(meshes.make_mesh({"data": 2, "model": 2})):
        votes = VOTES(q, k, LENGTHS[1:], (5, 50))
        places = jax.jit(ranks)(*votes)
    alone = VOTES(q, k, LENGTHS[1:], (5, 50))
    jax.tree.map(assert_close, votes, alone)
    jax.tree.map(np.testing.assert_array_equal, places, ranks(*map(jnp.asarray, jax.device_get(votes))))


def test_ranks_are_those_of_two_sorts():
    """Equal scores, zeros of both signs and NaN rank as in two stable sorts."""
    rng = np.random.default_rng(1)
    scores = rng.integers(-3, 4, (2, 3, 2, 500)).astype(np.float32)
    scores[0, 0] *= 0.0
    scores[1, 1, :, ::7] = np.nan
    for got, x in zip(jax.jit(ranks)(*scores), jnp.asarray(scores), strict=True):
        want = jnp.argsort(jnp.argsort(-x, axis=-1, stable=True), axis=-1)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft_cap": 3.0}, "soft_cap=3.0 is computed by implementation='xla' only, not by 'cuda'"),
        ({"sink_logits": np.zeros(4, np.float32)}, "sink_logits are computed by implementation='xla' only"),
        ({"window": Chunk(6)}, r"window=Chunk\(size=6\): the kernels support sliding windows only"),
        ({}, "q.dtype=float32: the CUDA votes kernel supports bfloat16, float16"),
    ],
)
def test_cuda_refuses_by_name(change: dict[str, Any], message: str):
    q, k = prompt((4, 2))
    with pytest.raises(NotImplementedError, match=message):
        VOTES(q, k, LENGTHS, (4,), implementation="cuda", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (4, 0)}, r"sizes\[1\]=0: expected at least 1"),
        ({"sizes": ()}, r"sizes=\(\): expected at least one"),
        ({"power": 0}, "power=0: expected at least 1"),
        ({"window": 0}, "window=0: expected at least 1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"implementation": "triton"}, "implementation='triton'.*xla"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str):
    q, k = prompt((4, 2))
    with pytest.raises(ValueError, match=message):
        VOTES(q, k, LENGTHS, **({"sizes": (4,)} | change))
