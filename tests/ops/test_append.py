"""The cache as a value: compress, append, flush, rows, growth, each step of it against the naive reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive
from support.layers import Rows, assert_close, assert_same, cache_of, naive_append, naive_rows, normal, with_garbage

from minikv_jax.cache.state import KVCache, LayerCache, append, compress, layer_capacity
from minikv_jax.methods.config import CacheConfig
from minikv_jax.ops.decode_attention import decode_attention
from minikv_jax.ops.select import select_tokens

N, K, H = 6, 2, 32

CONFIGS = {
    "full": CacheConfig(sinks=3),
    "minikv": CacheConfig(k_bits=2, v_bits=2, residual_length=32),
    "minikv-sinks": CacheConfig(k_bits=2, v_bits=2, residual_length=16, sinks=5, metadata_dtype="bfloat16"),
    "minikv-mixed": CacheConfig(k_bits=3, v_bits=8, residual_length=64, sinks=1, metadata_dtype="float8_e4m3fn"),
    "kivi": CacheConfig(k_bits=4, v_bits=2, group_size=32, residual="kivi", residual_length=32),
    "kivi-sinks": CacheConfig(
        k_bits=1, v_bits=4, metadata_dtype="float8_e4m3fn", residual="kivi", residual_length=32, sinks=4
    ),
}


def assert_attends(layer: LayerCache, rows: Rows, q: np.ndarray) -> None:
    out = jax.jit(decode_attention)(q, layer)
    for b, row in enumerate(rows):
        for h, head in enumerate(row):
            keys, values = head.keys(), head.values()
            for n in range(h * N // K, (h + 1) * N // K):
                assert_close(out[b, n], naive.attend(q[b, n], keys, values))


def boundary_lengths(config: CacheConfig) -> list[int]:
    """Prompts around every edge that the storage rule knows."""
    if not config.quantized:
        return [1, 2, 3, 4, 60]
    block, residual = config.packing_block, config.residual_length
    edges = {config.sinks + tokens for tokens in (0, block, residual, residual + block, residual + 2 * block)}
    return sorted({edge + step for edge in edges for step in (-1, 0, 1) if edge + step > 0})


@pytest.mark.parametrize("name", CONFIGS)
def test_append_rolls_over_like_naive(name: str):
    """Every row ends its prompt elsewhere and pauses at other steps, so tails fill up at different times; all the slots
    that are not in use hold NaN from the start."""
    config = CONFIGS[name]
    lengths = boundary_lengths(config)
    B, T = len(lengths), max(lengths)
    steps = config.residual_length + config.packing_block + 25 if config.quantized else 10
    rng = np.random.default_rng(0)
    k, v, new_k, new_v = (normal(rng, B, tokens, K, H) for tokens in (T, T, steps, steps))
    q = normal(rng, B, N, H)
    layer = with_garbage(cache_of(config, k, v, np.array(lengths), steps))
    rows = naive_rows(config, k, v, lengths)
    assert_same(layer, rows)
    step = jax.jit(append, donate_argnums=0)
    rolled_over = set()
    for t in range(steps):
        active = ((t + np.arange(B)) % 7 != 0).astype(np.int32)
        before = np.asarray(layer.packed_length)
        positions = np.zeros((B, 1), np.int32)
        layer = step(layer, new_k[:, t : t + 1], new_v[:, t : t + 1], active, positions)
        naive_append(rows, new_k[:, t : t + 1], new_v[:, t : t + 1], active)
        rolled_over |= {(t, int(b)) for b in np.flatnonzero(np.asarray(layer.packed_length) != before)}
        assert np.asarray(layer.tail_length).tolist() == [len(row[0].tail) for row in rows]
        if t % 16 == 0 or t == steps - 1:
            assert_same(layer, rows)
            assert_attends(layer, rows, q)
    if config.quantized:
        assert {b for _, b in rolled_over} == set(range(B))
        assert len({t for t, _ in rolled_over}) > 3
    assert np.asarray(layer.tokens).tolist() == [len(row[0].keys()) for row in rows]


def test_a_full_row_can_pause():
    """A row without room stays as it is while another one goes on."""
    rng = np.random.default_rng(7)
    k, v, new_k, new_v = (normal(rng, 2, tokens, K, H) for tokens in (20, 20, 1, 1))
    layer = cache_of(CacheConfig(), k, v, np.array([20, 12]))
    rows = naive_rows(CacheConfig(), k, v, [20, 12])
    counts = np.array([0, 1])
    naive_append(rows, new_k, new_v, counts)
    assert_same(jax.jit(append)(layer, new_k, new_v, counts, np.zeros((2, 1), np.int32)), rows)


@pytest.mark.parametrize("name", ["full", "minikv"])
def test_append_beyond_the_room_ends(name: str):
    """A tail that is full and cannot be packed takes no more."""
    config, rng = CONFIGS[name], np.random.default_rng(5)
    k, v, new_k, new_v = (normal(rng, 1, tokens, K, H) for tokens in (8, 8, 300, 300))
    layer = cache_of(config, k, v, np.array([8]), 4)
    got = jax.jit(append)(layer, new_k, new_v, np.array([300]), np.zeros((1, 300), np.int32))
    np.testing.assert_array_equal(got.tail_k[:, :, : layer.tail_length[0]], layer.tail_k[:, :, : layer.tail_length[0]])


@pytest.mark.parametrize("name", ["full", "minikv-sinks", "kivi"])
def test_append_of_many_tokens_is_append_of_each(name: str):
    """A chunk longer than the tail, with rows that add all, some and none of it."""
    config = CONFIGS[name]
    lengths, counts = [1, 21, 37, 80], np.array([70, 33, 0, 1])
    rng = np.random.default_rng(1)
    k, v, new_k, new_v = (normal(rng, 4, tokens, K, H) for tokens in (80, 80, 70, 70))
    new_k[np.arange(70) >= counts[:, None]] = np.nan
    layer = cache_of(config, k, v, np.array(lengths), 70)
    rows = naive_rows(config, k, v, lengths)
    naive_append(rows, new_k, new_v, counts)
    run = jax.jit(append)
    got = run(layer, new_k, new_v, counts, np.zeros((4, 70), np.int32))
    assert_same(got, rows)
    jax.tree.map(np.testing.assert_array_equal, run(layer, new_k, new_v, counts, np.zeros((4, 70), np.int32)), got)


@pytest.mark.parametrize("name", CONFIGS)
def test_short_prompts_stay_in_full_precision(name: str):
    """A prompt shorter than a group, and an answer shorter than the tail: nothing is ever packed."""
    config = dataclasses.replace(CONFIGS[name], residual_length=128)
    lengths = [1, 2, 7]
    rng = np.random.default_rng(2)
    k, v, new_k, new_v = (normal(rng, 3, tokens, K, H) for tokens in (7, 7, 5, 5))
    layer = cache_of(config, k, v, np.array(lengths), 5)
    rows = naive_rows(config, k, v, lengths)
    step = jax.jit(append)
    for t in range(5):
        one = slice(t, t + 1)
        layer = step(layer, new_k[:, one], new_v[:, one], np.ones(3, np.int32), np.zeros((3, 1), np.int32))
        naive_append(rows, new_k[:, one], new_v[:, one], np.ones(3, int))
    assert_same(layer, rows)
    assert int(layer.packed_length.max()) == 0
    assert_attends(layer, rows, normal(rng, 3, N, H))


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("name", ["full", "minikv-sinks", "minikv-mixed", "kivi-sinks"])
def test_room_can_be_used_to_the_last_token(name: str, tokens: int):
    """`max_new_tokens` fit, `room()` is what fits, and `grow` adds to it."""
    config = CONFIGS[name]
    lengths = [tokens, (tokens + 1) // 2]
    rng = np.random.default_rng(3)
    k, v = normal(rng, 2, tokens, K, H), normal(rng, 2, tokens, K, H)
    cache = KVCache((cache_of(config, k, v, np.array(lengths), 9),), jnp.asarray(lengths))
    room = cache.room()
    assert room >= 9
    grown = cache.grow(40)
    assert grown.room() >= room + 40
    new_k, new_v = normal(rng, 2, grown.room(), K, H), normal(rng, 2, grown.room(), K, H)
    for state in (cache, grown) if tokens > 1 else (cache,):
        count = state.room()
        rows = naive_rows(config, k, v, lengths)
        counts = np.full(2, count)
        naive_append(rows, new_k, new_v, counts)
        layer = jax.jit(append)(state.layers[0], new_k, new_v, counts, np.zeros((2, len(new_k[0])), np.int32))
        assert_same(layer, rows)
        assert 0 <= KVCache((layer,), state.length).room() < max(config.residual_length, 40)


@pytest.mark.parametrize("name", ["full", "minikv-sinks", "kivi-sinks"])
def test_rows_can_be_selected_reordered_and_tiled(name: str):
    config = CONFIGS[name]
    lengths = [70, 6, 41]
    rng = np.random.default_rng(4)
    k, v = normal(rng, 3, 70, K, H), normal(rng, 3, 70, K, H)
    cache = KVCache((cache_of(config, k, v, np.array(lengths), 30),) * 2, jnp.asarray(lengths))
    chosen = [2, 0, 0, 1]
    picked = jax.jit(KVCache.select_rows)(cache, jnp.array(chosen))
    assert picked.length.tolist() == [lengths[b] for b in chosen]
    tiled = cache.tile(2)
    assert tiled.length.tolist() == [70, 70, 6, 6, 41, 41]
    for state, order in ((picked, chosen), (tiled, [0, 0, 1, 1, 2, 2]), (cache.select_rows(jnp.array([1])), [1])):
        assert jax.tree.structure(state) == jax.tree.structure(cache)
        rows = naive_rows(config, k[order], v[order], [lengths[b] for b in order])
        assert_same(state.layers[1], rows)
    # Copies of a row go their own ways afterwards.
    new_k, new_v = normal(rng, 4, 30, K, H), normal(rng, 4, 30, K, H)
    counts = np.array([30, 12, 30, 0])
    rows = naive_rows(config, k[chosen], v[chosen], [lengths[b] for b in chosen])
    naive_append(rows, new_k, new_v, counts)
    layer = jax.jit(append)(picked.layers[0], new_k, new_v, counts, np.zeros((4, 30), np.int32))
    assert_same(layer, rows)


def test_lengths_stay_within_the_capacity():
    """An overflow is the caller's fault and loses tokens, but no kernel is told of tokens that are not there."""
    config = CONFIGS["minikv-sinks"]
    rng = np.random.default_rng(7)
    k, v = (normal(rng, 2, 60, K, H) for _ in range(2))
    layer = cache_of(config, k, v, np.array([60, 30]))
    more = layer.packed_capacity + layer.tail_capacity
    new = normal(rng, 2, more, K, H)
    layer = jax.jit(append)(layer, new, new, np.full(2, more), np.zeros((2, more), np.int32))
    assert (np.asarray(layer.packed_length) <= layer.packed_capacity).all()
    assert (np.asarray(layer.tail_length) <= layer.tail_capacity).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_sliding_window_layer(quantized: bool):
    """Only what the next token can see is kept of the prompt; later, tokens leave the window one by one."""
    window, steps, T, lengths = 40, 37, 70, [70, 12, 40]
    config = CacheConfig(k_bits=2, v_bits=2, residual_length=16) if quantized else CacheConfig()
    rng = np.random.default_rng(5)
    k, v, new_k, new_v = (normal(rng, 3, tokens, K, H) for tokens in (T, T, steps, steps))
    q = normal(rng, 3, N, H)
    capacity = layer_capacity(config, 0.0, T, steps, window)

    @jax.jit
    def start(k: jax.Array, v: jax.Array, lengths: jax.Array) -> LayerCache:
        nothing = jnp.zeros((3, K, T))
        kept = select_tokens(nothing, lengths, jnp.zeros_like(lengths), config, capacity.kept, window)
        return compress(k, v, kept, config, capacity, window)

    layer = start(k, v, np.array(lengths))
    kept = [list(range(max(0, n - window + 1), n)) for n in lengths]
    rows = [
        [naive.HeadCache.compress(config, k[b, :, h], v[b, :, h], positions) for h in range(K)]
        for b, positions in enumerate(kept)
    ]
    assert_same(layer, rows)
    step, attend = jax.jit(append), jax.jit(decode_attention)
    for t in range(steps):
        now = np.array(lengths) + t
        layer = step(layer, new_k[:, t : t + 1], new_v[:, t : t + 1], np.ones(3, np.int32), now[:, None])
        naive_append(rows, new_k[:, t : t + 1], new_v[:, t : t + 1], np.ones(3, int))
        if t % 12 and t != steps - 1:
            continue
        assert_same(layer, rows)
        out = attend(q, layer, now)
        for b, row in enumerate(rows):
            positions = np.array([*kept[b], *range(lengths[b], lengths[b] + t + 1)])
            seen = positions > now[b] - window
            assert quantized or seen.sum() == min(window, now[b] + 1)
            for n in range(N):
                head = row[n // (N // K)]
                want = naive.attend(q[b, n], head.keys()[seen], head.values()[seen])
                assert_close(out[b, n], want)


def test_bfloat16_cache():
    """Tails keep the model's dtype; codes are those of the bfloat16 numbers."""
    config = CONFIGS["minikv-sinks"]
    rng = np.random.default_rng(6)
    k, v = (normal(rng, 2, 60, K, H).astype(jnp.bfloat16) for _ in range(2))
    layer = cache_of(config, k, v, np.array([60, 30]))
    assert layer.tail_k.dtype == layer.tail_v.dtype == jnp.bfloat16
    assert_same(layer, naive_rows(config, k, v, [60, 30]))


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_the_leaves(name: str):
    layer = cache_of(
        CONFIGS[name], np.zeros((2, 50, K, H), np.float32), np.zeros((2, 50, K, H), np.float32), np.full(2, 50)
    )
    cache = KVCache((layer, layer), jnp.full(2, 50))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
    assert cache.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert layer.nbytes == (cache.nbytes - cache.length.nbytes) // 2
    assert cache.packed_bytes == 2 * (sum(leaf.nbytes for leaf in jax.tree.leaves((layer.k, layer.v))))
    assert (cache.packed_bytes > 0) == CONFIGS[name].quantized
    np.testing.assert_array_equal(cache.kept_tokens, np.full((2, 2), 50))
