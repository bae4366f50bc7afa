"""Tests compress bit for bit against the naive reference."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import assert_same, cache_of, naive_rows, normal

from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail

K, H = 2, 32
SINKS = Method(quantizer=MinMax(metadata_dtype="bfloat16"), tail=Tail(length=16), sinks=5)
KIVI = Method(quantizer=MinMax(k_bits=4, group_size=32), tail=Tail(length=32, rule="kivi"), sinks=3)


@pytest.mark.parametrize("method", [Method(sinks=3), SINKS, KIVI], ids=["full", "sinks", "kivi"])
def test_a_prompt_is_stored_like_naive(method: Method):
    """Rows have only sinks, one token less or more than a packing block, or many blocks."""
    lengths = [1, 3, 5, 20, 21, 22, 66, 67, 68, 99, 130]
    rng = np.random.default_rng(0)
    k, v = (normal(rng, len(lengths), 130, K, H) for _ in range(2))
    layer = cache_of(method, k, v, np.array(lengths), 7)
    assert_same(layer, naive_rows(method, k, v, lengths))
    np.testing.assert_array_equal(layer.tokens, lengths)


def test_bfloat16_cache():
    """Tails keep the model's dtype, and codes are those of the bfloat16 numbers."""
    rng = np.random.default_rng(6)
    k, v = (normal(rng, 2, 60, K, H).astype(jnp.bfloat16) for _ in range(2))
    layer = cache_of(SINKS, k, v, np.array([60, 30]))
    assert layer.tail.k.dtype == layer.tail.v.dtype == jnp.bfloat16
    assert_same(layer, naive_rows(SINKS, k, v, [60, 30]))


def test_a_layer_that_does_not_quantise_has_no_packed_region():
    zeros = np.zeros((2, 50, K, H), np.float32)
    layer = cache_of(Method(), zeros, zeros, np.array([50, 8]))
    assert layer.packed.capacity == layer.packed.nbytes == 0
    assert layer.packed.length.tolist() == [0, 0]
    assert layer.tail.length.tolist() == [50, 8]
