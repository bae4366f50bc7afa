"""Tests soft caps of attention logits against dense float64 softmax maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import assert_close, cache_of, normal

from minikv_jax.methods.method import Method
from minikv_jax.ops.decode_attention import decode_attention, decode_attention_weights
from minikv_jax.ops.extend_attention import extend_attention
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.window_votes import window_votes

B, T, N, K, H = 2, 21, 4, 2, 16
CAP = 0.7  # of logits that reach 3
LENGTHS = np.array([T, 13])


def attention_map(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Computes one row's causal map [N, Q, S] of the last Q of S tokens."""
    logits = np.einsum("qnh,snh->nqs", q.astype(np.float64), np.repeat(k, N // K, axis=1)) * H**-0.5
    position = np.arange(len(k) - len(q), len(k))[:, None]
    weights = np.where(np.arange(len(k)) <= position, np.exp(CAP * np.tanh(logits / CAP)), 0)
    return weights / weights.sum(-1, keepdims=True)


def output(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("nqs,snh->qnh", weights, np.repeat(v, N // K, axis=1).astype(np.float64))


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return normal(rng, B, T, N, H), normal(rng, B, T, K, H), normal(rng, B, T, K, H)


def test_prefill_its_scores_and_votes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minikv_jax.ops.prefill_attention.BLOCK", 8)
    q, k, v = arrays()
    out, sums = jax.jit(lambda *arrays: prefill_attention(*arrays, soft_cap=CAP, with_scores=True))(q, k, v, LENGTHS)
    for b, n in enumerate(LENGTHS):
        weights = attention_map(q[b, :n], k[b, :n])
        assert_close(out[b, :n], output(weights, v[b, :n]))
        assert_close(sums[b, :, :n], weights.sum(axis=1).reshape(K, -1, n).sum(axis=1))
    (votes,) = jax.jit(functools.partial(window_votes, sizes=(40,), soft_cap=CAP))(q, k, LENGTHS)
    assert_close(votes, sums)


def test_decode_and_extend():
    q, k, v = arrays()
    layer = cache_of(Method(), k, v, LENGTHS)
    out = jax.jit(lambda q, layer: decode_attention(q, layer, soft_cap=CAP))(q[:, 0], layer)
    same, weights = jax.jit(lambda q, layer: decode_attention_weights(q, layer, soft_cap=CAP))(q[:, 0], layer)
    np.testing.assert_array_equal(same, out)
    new = [x[:, ::-1][:, :3] for x in (q, k, v)]
    extend = jax.jit(lambda q, k, v, layer, lengths: extend_attention(q, k, v, layer, lengths, soft_cap=CAP))
    extended = extend(*new, layer, jnp.array([3, 2]))
    for b, n in enumerate(LENGTHS):
        want = attention_map(q[b, :1], k[b, :n])
        assert_close(out[b], output(want, v[b, :n])[0])
        assert_close(weights[b, :, :n], want[:, 0].reshape(K, -1, n).sum(axis=1))
        count = (3, 2)[b]
        keys, values = (
            np.concatenate([old[b, :n], more[b, :count]]) for old, more in zip((k, v), new[1:], strict=True)
        )
        assert_close(extended[b, :count], output(attention_map(new[0][b, :count], keys), values))


@pytest.mark.parametrize("implementation", ["pallas", "cuda"])
def test_kernels_refuse_them_by_name(implementation: str):
    q, k, v = map(jnp.asarray, arrays())
    message = rf"soft_cap=0\.7 is computed by implementation='xla' only, not by '{implementation}'"
    with pytest.raises(NotImplementedError, match=f"prefill_attention: {message}"):
        prefill_attention(q, k, v, jnp.asarray(LENGTHS), soft_cap=CAP, implementation=implementation)
    layer = cache_of(Method(), *arrays()[1:], LENGTHS)
    with pytest.raises(NotImplementedError, match=f"decode_attention: {message}"):
        decode_attention(q[:, 0], layer, soft_cap=CAP, implementation=implementation)


def test_values_that_are_not_accepted_are_named():
    q, k, v = map(jnp.asarray, arrays())
    with pytest.raises(ValueError, match=r"soft_cap.*0\.0"):
        prefill_attention(q, k, v, jnp.asarray(LENGTHS), soft_cap=0.0)
