"""The cache as a value: rows taken, reordered and repeated, room and growth, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import assert_same, cache_of, naive_append, naive_rows, normal

from minikv_jax.cache.state import KVCache
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.append import append

K, H = 2, 32
APPEND = jax.jit(append)

METHODS = {
    "full": Method(sinks=3),
    "minikv-sinks": Method(quantizer=MinMax(metadata_dtype="bfloat16"), tail=Tail(length=16), sinks=5),
    "minikv-mixed": Method(
        quantizer=MinMax(k_bits=3, v_bits=8, metadata_dtype="float8_e4m3fn"), tail=Tail(length=64), sinks=1
    ),
    "kivi-sinks": Method(
        quantizer=MinMax(k_bits=1, v_bits=4, metadata_dtype="float8_e4m3fn"),
        tail=Tail(length=32, rule="kivi"),
        sinks=4,
    ),
}


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("name", ["full", "minikv-sinks", "minikv-mixed", "kivi-sinks"])
def test_room_can_be_used_to_the_last_token(name: str, tokens: int):
    """`max_new_tokens` fit, `room()` is what fits, and `grow` adds to it."""
    method = METHODS[name]
    lengths = [tokens, (tokens + 1) // 2]
    rng = np.random.default_rng(3)
    k, v = normal(rng, 2, tokens, K, H), normal(rng, 2, tokens, K, H)
    cache = KVCache((cache_of(method, k, v, np.array(lengths), 9),), jnp.asarray(lengths))
    room = cache.room()
    assert room >= 9
    grown = cache.grow(40)
    assert grown.room() >= room + 40
    new_k, new_v = normal(rng, 2, grown.room(), K, H), normal(rng, 2, grown.room(), K, H)
    for state in (cache, grown) if tokens > 1 else (cache,):
        count = state.room()
        rows = naive_rows(method, k, v, lengths)
        counts = np.full(2, count)
        naive_append(rows, new_k, new_v, counts)
        layer = APPEND(state.layers[0], new_k, new_v, counts, np.zeros((2, len(new_k[0])), np.int32))
        assert_same(layer, rows)
        assert 0 <= KVCache((layer,), state.length).room() < max(method.tail.length, 40)


@pytest.mark.parametrize("name", ["full", "minikv-sinks", "kivi-sinks"])
def test_rows_can_be_selected_reordered_and_tiled(name: str):
    method = METHODS[name]
    lengths = [70, 6, 41]
    rng = np.random.default_rng(4)
    k, v = normal(rng, 3, 70, K, H), normal(rng, 3, 70, K, H)
    cache = KVCache((cache_of(method, k, v, np.array(lengths), 30),) * 2, jnp.asarray(lengths))
    chosen = [2, 0, 0, 1]
    picked = jax.jit(KVCache.select_rows)(cache, jnp.array(chosen))
    assert picked.length.tolist() == [lengths[b] for b in chosen]
    tiled = cache.tile(2)
    assert tiled.length.tolist() == [70, 70, 6, 6, 41, 41]
    for state, order in ((picked, chosen), (tiled, [0, 0, 1, 1, 2, 2]), (cache.select_rows(jnp.array([1])), [1])):
        assert jax.tree.structure(state) == jax.tree.structure(cache)
        rows = naive_rows(method, k[order], v[order], [lengths[b] for b in order])
        assert_same(state.layers[1], rows)
    # Copies of a row go their own ways afterwards.
    new_k, new_v = normal(rng, 4, 30, K, H), normal(rng, 4, 30, K, H)
    counts = np.array([30, 12, 30, 0])
    rows = naive_rows(method, k[chosen], v[chosen], [lengths[b] for b in chosen])
    naive_append(rows, new_k, new_v, counts)
    layer = APPEND(picked.layers[0], new_k, new_v, counts, np.zeros((4, 30), np.int32))
    assert_same(layer, rows)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_the_leaves(name: str):
    layer = cache_of(
        METHODS[name], np.zeros((2, 50, K, H), np.float32), np.zeros((2, 50, K, H), np.float32), np.full(2, 50)
    )
    cache = KVCache((layer, layer), jnp.full(2, 50))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
    assert cache.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert layer.nbytes == (cache.nbytes - cache.length.nbytes) // 2
    assert cache.packed_bytes == 2 * (sum(leaf.nbytes for leaf in jax.tree.leaves((layer.packed.k, layer.packed.v))))
    assert (cache.packed_bytes > 0) == (METHODS[name].quantizer is not None)
    np.testing.assert_array_equal(cache.kept_tokens, np.full((2, 2), 50))
