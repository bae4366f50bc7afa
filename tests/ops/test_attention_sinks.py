"""Tests attention sinks, logits in the softmax's denominator only, against dense float64 softmax maps."""

import jax
import numpy as np
import pytest
from support.layers import assert_close, cache_of, normal

from minikv_jax import meshes
from minikv_jax.methods.method import Method
from minikv_jax.ops.decode_attention import decode_attention, decode_attention_weights
from minikv_jax.ops.extend_attention import extend_attention
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.window_votes import window_votes

VOTES = jax.jit(window_votes, static_argnames=("sizes", "window"))
PREFILL = jax.jit(prefill_attention, static_argnames=("window", "with_scores", "implementation"))
DECODE = jax.jit(decode_attention, static_argnames=("implementation",))
B, T, N, K, H = 2, 21, 4, 2, 16
SINKS = np.array([-3.0, 0.5, 4.0, 0.0], np.float32)
LENGTHS = np.array([T, 13])


def attention_map(q: np.ndarray, k: np.ndarray, window: int | None = None) -> np.ndarray:
    """Computes one row's causal map [N, Q, S] of the last Q of S tokens, with a column for the sink that is dropped."""
    queries, keys = len(q), len(k)
    logits = np.einsum("qnh,snh->nqs", q.astype(np.float64), np.repeat(k, N // K, axis=1)) * H**-0.5
    position = np.arange(keys - queries, keys)[:, None]
    seen = (np.arange(keys) <= position) & (np.arange(keys) > position - (window or keys))
    logits = np.concatenate(
        [np.where(seen, logits, -np.inf), np.broadcast_to(SINKS[:, None, None], (N, queries, 1))], -1
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[..., :-1]


def output(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("nqs,snh->qnh", weights, np.repeat(v, N // K, axis=1).astype(np.float64))


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return normal(rng, B, T, N, H), normal(rng, B, T, K, H), normal(rng, B, T, K, H)


@pytest.mark.parametrize("window", [None, 5])
def test_prefill_and_its_scores(window: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minikv_jax.ops.prefill_attention.BLOCK", 8)
    q, k, v = arrays()
    out, sums = PREFILL(q, k, v, LENGTHS, sink_logits=SINKS, window=window, with_scores=True)
    for b, n in enumerate(LENGTHS):
        weights = attention_map(q[b, :n], k[b, :n], window)
        assert_close(out[b, :n], output(weights, v[b, :n]))
        assert_close(sums[b, :, :n], weights.sum(axis=1).reshape(K, -1, n).sum(axis=1))
    (votes,) = VOTES(q, k, LENGTHS, (40,), window=window, sink_logits=SINKS)
    assert_close(votes, sums)


def test_decode_and_extend():
    q, k, v = arrays()
    layer = cache_of(Method(), k, v, LENGTHS)
    out = DECODE(q[:, 0], layer, sink_logits=SINKS)
    same, weights = jax.jit(decode_attention_weights)(q[:, 0], layer, sink_logits=SINKS)
    np.testing.assert_array_equal(same, out)
    new_q, new_k, new_v = (x[:, ::-1][:, :3] for x in (q, k, v))
    extended = jax.jit(extend_attention)(new_q, new_k, new_v, layer, np.array([3, 2]), sink_logits=SINKS)
    for b, n in enumerate(LENGTHS):
        want = attention_map(q[b, :1], k[b, :n])
        assert_close(out[b], output(want, v[b, :n])[0])
        assert_close(weights[b, :, :n], want[:, 0].reshape(K, -1, n).sum(axis=1))
        new = (3, 2)[b]
        keys, values = (np.concatenate([old[b, :n], more[b, :new]]) for old, more in ((k, new_k), (v, new_v)))
        assert_close(extended[b, :new], output(attention_map(new_q[b, :new], keys), values))


def test_devices_of_a_mesh_have_their_own_heads():
    q, k, v = arrays()
    want, _ = PREFILL(q, k, v, LENGTHS, sink_logits=SINKS)
    with jax.set_mesh(meshes.make_mesh({"data": 2, "model": 2})):
        got, _ = PREFILL(q, k, v, LENGTHS, sink_logits=SINKS)
    assert_close(got, want)


@pytest.mark.parametrize("implementation", ["pallas", "cuda"])
def test_kernels_refuse_them_by_name(implementation: str):
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match=f"prefill_attention: sink_logits .* not by '{implementation}'"):
        PREFILL(q, k, v, LENGTHS, sink_logits=SINKS, implementation=implementation)
    layer = cache_of(Method(), k, v, LENGTHS)
    with pytest.raises(NotImplementedError, match=f"decode_attention: sink_logits .* not by '{implementation}'"):
        DECODE(q[:, 0], layer, sink_logits=SINKS, implementation=implementation)


def test_another_number_of_them_is_named():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"sink_logits .*3"):
        PREFILL(q, k, v, LENGTHS, sink_logits=SINKS[:3])
