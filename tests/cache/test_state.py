"""Tests the cache as a value: selection of rows, room and growth, and bytes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import assert_same, cache_of, naive_append, naive_rows, normal

from minikv_jax.arrays import debug_checks
from minikv_jax.cache.kv_cache import KVCache
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
        quantizer=MinMax(k_bits=1, v_bits=4, metadata_dtype="bfloat16"),
        tail=Tail(length=32, rule="kivi"),
        sinks=4,
    ),
}


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("name", ["full", "minikv-sinks", "minikv-mixed", "kivi-sinks"])
def test_room_can_be_used_to_the_last_token(name: str, tokens: int):
    """`max_new_tokens` fit, `room()` counts them, and `grow` adds to them."""
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
        assert_same(state.parts[1], rows)
    # Copies of a row differ afterwards.
    new_k, new_v = normal(rng, 4, 30, K, H), normal(rng, 4, 30, K, H)
    counts = np.array([30, 12, 30, 0])
    rows = naive_rows(method, k[chosen], v[chosen], [lengths[b] for b in chosen])
    naive_append(rows, new_k, new_v, counts)
    layer = APPEND(picked.layers[0], new_k, new_v, counts, np.zeros((4, 30), np.int32))
    assert_same(layer, rows)


def two_rows() -> KVCache:
    k = np.random.default_rng(0).normal(size=(2, 50, K, H)).astype(np.float32)
    return KVCache((cache_of(METHODS["minikv-sinks"], k, k, np.array([50, 20]), 9),), jnp.array([50, 20]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 2]), r"rows\[1\] is 2: expected integers in 0..1"),
        (np.array([-1]), r"rows\[0\] is -1: expected integers in 0..1"),
        (np.array([1.0]), r"rows is float64\[1\]: expected integers \[R\]"),
        (np.array([True, False]), r"rows is bool\[2\]: expected integers \[R\]"),
        (np.array([[0]]), r"rows is int64\[1, 1\]: expected integers \[R\]"),
        (np.array([], int), r"rows is int64\[0\]: expected integers \[R\], none of size 0"),
        ([0], "rows is a list"),
        (1, "rows is a int"),
    ],
)
def test_rows_that_a_cache_does_not_have_are_named(rows: Any, message: str):
    with pytest.raises(ValueError, match=f"^select_rows: {message}"):
        two_rows().select_rows(rows)


def test_under_jit_a_row_out_of_range_is_clipped_or_reported():
    """A row out of range never becomes NaN, which generation would take for scores."""
    cache = two_rows()
    clipped = jax.jit(KVCache.select_rows)(cache, jnp.array([-3, 7]))
    jax.tree.map(np.testing.assert_array_equal, clipped, cache)
    checked = debug_checks(KVCache.select_rows)
    jax.tree.map(np.testing.assert_array_equal, checked(cache, jnp.array([0, 1])), cache)
    with pytest.raises(ValueError, match=r"^select_rows: rows lies in 0..7: expected integers in 0..1$"):
        checked(cache, jnp.array([0, 7]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.tile(0), "times=0: expected at least 1"),
        (lambda cache: cache.tile(2.0), "times=2.0: expected an integer"),
        (lambda cache: cache.tile(10**12), "times=1000000000000: expected at most 16777216"),
        (lambda cache: cache.grow(-1), "tokens=-1: expected at least 0"),
        (lambda cache: cache.grow("8"), "tokens='8': expected an integer"),
        (lambda cache: cache.layers[0].grow(10**11), "tokens=100000000000: expected at most 16777216"),
        (lambda cache: jax.jit(KVCache.room)(cache), "KVCache.room reads the lengths, which jit does not know"),
    ],
)
def test_sizes_out_of_range_are_named(call: Callable[[KVCache], object], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(two_rows())


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
