"""Tests OSCAR's closed form against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from minikv_jax import packing
from minikv_jax.methods import oscar
from minikv_jax.methods.quarot import hadamard
from minikv_jax.packing import Packing

RNG = np.random.default_rng(0)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, stored: np.ndarray) -> list[np.ndarray]:
    """Second moments of the paper, token by token: of the queries, and of the values that they read."""
    texts, queries, heads, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    asked = np.zeros((kv_heads, dim, dim))
    for text, query, head in np.ndindex(texts, queries, heads):
        one = q[text, query, head].astype(float)
        asked[head * kv_heads // heads] += np.outer(one, one) / (texts * queries * heads / kv_heads)
    read = np.zeros((dim, dim))
    for head in range(kv_heads):
        tokens = [(text, slot) for text, slot in np.ndindex(texts, slots) if stored[text, head, slot]]
        weights = [k[text, head, slot] @ asked[head] @ k[text, head, slot] for text, slot in tokens]
        for weight, (text, slot) in zip(weights, tokens, strict=True):
            read += weight / np.mean(weights) * np.outer(v[text, head, slot], v[text, head, slot])
    return [asked.mean(axis=0), read]


@pytest.mark.parametrize("dim", [16, 24])
def test_equals_the_definition(dim: int):
    scale = np.exp(RNG.normal(size=dim))
    q, k, v = (RNG.normal(size=shape) * scale for shape in ((3, 7, 4, dim), (3, 2, 11, dim), (3, 2, 11, dim)))
    stored = RNG.random((3, 2, 11)) < 0.7
    k[~stored] = v[~stored] = 1e3  # filler counts for nothing
    arrays = {"q": q, "k": k, "v": v}
    got = oscar.rotations(
        **{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}, stored=jnp.asarray(stored)
    )
    for rotation, matrix in zip(got, naive(q, k, v, stored), strict=True):
        rotation = np.asarray(rotation)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(dim), atol=1e-5)
        basis = rotation @ hadamard(dim).T  # eigenvectors, which make the matrix diagonal
        diagonal = basis.T @ matrix @ basis
        np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-4 * np.trace(matrix))
        falling = np.diag(diagonal)[np.argsort(oscar.bit_reversed(dim))]
        assert (np.diff(falling) < 1e-5 * falling[0]).all()


def test_bits_are_reversed():
    np.testing.assert_array_equal(oscar.bit_reversed(8), [0, 4, 2, 6, 1, 5, 3, 7])
    assert sorted(oscar.bit_reversed(24)) == list(range(24))


def test_queries_lose_less_of_what_they_ask_for():
    """With keys that differ most where no query looks, the closed form loses less than a Hadamard matrix alone."""
    directions = np.linalg.qr(RNG.normal(size=(32, 32)))[0]
    loud, asking = np.geomspace(30, 0.3, 32), np.geomspace(0.3, 30, 32)
    k = (RNG.normal(size=(1, 2, 256, 32)) * loud) @ directions
    q = (RNG.normal(size=(1, 64, 2, 32)) * asking) @ directions
    k, q = jnp.asarray(k, jnp.float32), jnp.asarray(q, jnp.float32)
    rotation, _ = oscar.rotations(q, k, k, jnp.ones(k.shape[:3], bool))
    rule = Packing(2, 16, "channels", "float16", 32)

    def lost(rotation: jnp.ndarray) -> float:
        back = packing.dequantize(packing.encode_minmax(k @ rotation, rule)) @ rotation.T
        return float(jnp.mean(jnp.einsum("wqkh,wksh->wkqs", q, back - k) ** 2))

    assert lost(rotation) < lost(jnp.asarray(hadamard(32)))


def test_a_layer_without_any_queries_weight_still_gets_rotations():
    zero = jnp.zeros((1, 4, 2, 16))
    k = jnp.asarray(RNG.normal(size=(1, 2, 8, 16)), jnp.float32)
    for rotation in oscar.rotations(zero, k, k, jnp.ones((1, 2, 8), bool)):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
