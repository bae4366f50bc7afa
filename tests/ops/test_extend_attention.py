"""Tests extend attention of several new tokens over a cache and one another, against dense softmax maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive
from support.layers import assert_close, cache_of, naive_rows, normal, poison, stored, with_garbage

from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.extend_attention import extend_attention

METHODS = {
    "full": Method(),
    "2-bit-sinks": Method(quantizer=MinMax(metadata_dtype="bfloat16"), tail=Tail(length=16), sinks=5),
    "1-3-bit-kivi": Method(
        quantizer=MinMax(k_bits=1, v_bits=3, metadata_dtype="float8_e4m3fn"), tail=Tail(length=32, rule="kivi")
    ),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_extend_matches_naive(method: Method):
    """New tokens see the stored tokens as quantised, and one another causally; their padding is NaN."""
    N, K, H, T, new = 6, 2, 32, 70, 9
    lengths, counts = np.array([0, 3, 70, 66]), np.array([9, 1, 8, 0])
    rng = np.random.default_rng(4)
    k, v = normal(rng, 4, T, K, H), normal(rng, 4, T, K, H)
    new_q, new_k, new_v = normal(rng, 4, new, N, H), normal(rng, 4, new, K, H), normal(rng, 4, new, K, H)
    poison(counts, new_q, new_k, new_v)
    layer = with_garbage(cache_of(method, k, v, lengths))
    out = np.asarray(jax.jit(extend_attention)(new_q, new_k, new_v, layer, counts))
    assert np.isfinite(out[np.arange(new) < counts[:, None]]).all()
    for b, row in enumerate(stored(naive_rows(method, k, v, lengths.tolist()))):
        for head in range(N):
            kv_head = head // (N // K)
            keys, values = (
                np.concatenate([old, x[b, :, kv_head]]) for old, x in zip(row[kv_head], (new_k, new_v), strict=True)
            )
            for t in range(counts[b]):
                seen = slice(lengths[b] + t + 1)
                assert_close(out[b, t, head], naive.attend(new_q[b, t, head], keys[seen], values[seen]))


def test_wrong_input_is_named():
    q, k, lengths = jnp.zeros((2, 5, 4, 16)), jnp.zeros((2, 5, 2, 16)), jnp.array([5, 2])
    zeros = np.zeros((2, 5, 2, 16), np.float32)
    layer = cache_of(Method(), zeros, zeros, np.array([5, 2]))
    cases = [
        (
            lambda: extend_attention(q, k, k[:, :4], layer, lengths),
            r"v is float32\[2, 4, 2, 16\]: expected float32 \[B, T, K, H\], B=2, T=5, K=2",
        ),
        (lambda: extend_attention(q, k, k, layer, lengths[:1]), r"lengths is int32\[1\]: expected integers \[B\], B=2"),
        (
            lambda: extend_attention(q[:1], k[:1], k[:1], layer, lengths[:1]),
            r"q is float32\[1, 5, 4, 16\]: expected float32 \[B, T, N, H\], B=2, H=16",
        ),
        (lambda: extend_attention(q, k, k, layer, lengths, implementation="triton"), "implementation='triton'.*xla"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotImplementedError, match="extend_attention: no 'cuda' kernel"):
        extend_attention(q, k, k, layer, lengths, implementation="cuda")
