"""Tests append and flush step by step against the naive reference: rows that flush, pause or are full."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive
from support.layers import Rows, assert_close, assert_same, cache_of, naive_append, naive_rows, normal, with_garbage

from minikv_jax.arrays import debug_checks
from minikv_jax.cache.capacity import layer_capacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.append import append
from minikv_jax.ops.compress import compress
from minikv_jax.ops.decode_attention import decode_attention
from minikv_jax.ops.select import select

N, K, H = 6, 2, 32
APPEND, ATTEND = jax.jit(append), jax.jit(decode_attention)  # one program per method and set of shapes

METHODS = {
    "full": Method(sinks=3),
    "minikv": Method(quantizer=MinMax(), tail=Tail(length=32)),
    "minikv-sinks": Method(quantizer=MinMax(metadata_dtype="bfloat16"), tail=Tail(length=16), sinks=5),
    "minikv-mixed": Method(
        quantizer=MinMax(k_bits=3, v_bits=8, metadata_dtype="float8_e4m3fn"), tail=Tail(length=64), sinks=1
    ),
    "kivi": Method(quantizer=MinMax(k_bits=4, v_bits=2, group_size=32), tail=Tail(length=32, rule="kivi")),
    "kivi-sinks": Method(
        quantizer=MinMax(k_bits=1, v_bits=4, metadata_dtype="float8_e4m3fn"),
        tail=Tail(length=32, rule="kivi"),
        sinks=4,
    ),
}


def assert_attends(layer: LayerCache, rows: Rows, q: np.ndarray) -> None:
    out = np.asarray(ATTEND(q, layer))
    for b, row in enumerate(rows):
        for h, head in enumerate(row):
            keys, values = head.keys(), head.values()
            for n in range(h * N // K, (h + 1) * N // K):
                assert_close(out[b, n], naive.attend(q[b, n], keys, values))


def boundary_lengths(method: Method) -> list[int]:
    """Prompt lengths around every limit of the storage rule."""
    if method.quantizer is None:
        return [1, 2, 3, 4, 60]
    block, tail = method.quantizer.block, method.tail.length
    edges = {method.sinks + tokens for tokens in (0, block, tail, tail + block, tail + 2 * block)}
    return sorted({edge + step for edge in edges for step in (-1, 0, 1) if edge + step > 0})


@pytest.mark.parametrize("name", METHODS)
def test_append_rolls_over_like_naive(name: str):
    """Rows have different prompts and pauses, so that tails fill up at different times; unused slots hold NaN."""
    method = METHODS[name]
    lengths = boundary_lengths(method)
    B, T = len(lengths), max(lengths)
    steps = method.tail.length + method.quantizer.block + 25 if method.quantizer else 10
    rng = np.random.default_rng(0)
    k, v, new_k, new_v = (normal(rng, B, tokens, K, H) for tokens in (T, T, steps, steps))
    q = normal(rng, B, N, H)
    layer = with_garbage(cache_of(method, k, v, np.array(lengths), steps))
    rows = naive_rows(method, k, v, lengths)
    assert_same(layer, rows)
    step = jax.jit(append, donate_argnums=0)
    rolled_over = set()
    for t in range(steps):
        active = ((t + np.arange(B)) % 7 != 0).astype(np.int32)
        before = np.asarray(layer.packed.length)
        positions = np.zeros((B, 1), np.int32)
        layer = step(layer, new_k[:, t : t + 1], new_v[:, t : t + 1], active, positions)
        naive_append(rows, new_k[:, t : t + 1], new_v[:, t : t + 1], active)
        rolled_over |= {(t, int(b)) for b in np.flatnonzero(np.asarray(layer.packed.length) != before)}
        assert np.asarray(layer.tail.length).tolist() == [len(row[0].tail) for row in rows]
        if t % 16 == 0 or t == steps - 1:
            assert_same(layer, rows)
            assert_attends(layer, rows, q)
    if method.quantizer:
        assert {b for _, b in rolled_over} == set(range(B))
        assert len({t for t, _ in rolled_over}) > 3
    assert np.asarray(layer.tokens).tolist() == [len(row[0].keys()) for row in rows]


def test_a_full_row_can_pause():
    """A full row stays unchanged while another one continues."""
    rng = np.random.default_rng(7)
    k, v, new_k, new_v = (normal(rng, 2, tokens, K, H) for tokens in (20, 20, 1, 1))
    layer = cache_of(Method(), k, v, np.array([20, 12]))
    rows = naive_rows(Method(), k, v, [20, 12])
    counts = np.array([0, 1])
    naive_append(rows, new_k, new_v, counts)
    assert_same(APPEND(layer, new_k, new_v, counts, np.zeros((2, 1), np.int32)), rows)


@pytest.mark.parametrize("name", ["full", "minikv"])
def test_append_beyond_the_room_ends(name: str):
    """A full tail that cannot be packed accepts no more tokens."""
    method, rng = METHODS[name], np.random.default_rng(5)
    k, v, new_k, new_v = (normal(rng, 1, tokens, K, H) for tokens in (8, 8, 300, 300))
    layer = cache_of(method, k, v, np.array([8]), 4)
    got = APPEND(layer, new_k, new_v, np.array([300]), np.zeros((1, 300), np.int32))
    np.testing.assert_array_equal(got.tail.k[:, :, : layer.tail.length[0]], layer.tail.k[:, :, : layer.tail.length[0]])


@pytest.mark.parametrize("name", ["full", "minikv-sinks", "kivi"])
def test_append_of_many_tokens_is_append_of_each(name: str):
    """A chunk is longer than the tail, and rows append all, some or none of it."""
    method = METHODS[name]
    lengths, counts = [1, 21, 37, 80], np.array([70, 33, 0, 1])
    rng = np.random.default_rng(1)
    k, v, new_k, new_v = (normal(rng, 4, tokens, K, H) for tokens in (80, 80, 70, 70))
    new_k[np.arange(70) >= counts[:, None]] = np.nan
    layer = cache_of(method, k, v, np.array(lengths), 70)
    rows = naive_rows(method, k, v, lengths)
    naive_append(rows, new_k, new_v, counts)
    got = APPEND(layer, new_k, new_v, counts, np.zeros((4, 70), np.int32))
    assert_same(got, rows)
    jax.tree.map(np.testing.assert_array_equal, APPEND(layer, new_k, new_v, counts, np.zeros((4, 70), np.int32)), got)


@pytest.mark.parametrize("name", METHODS)
def test_short_prompts_stay_in_full_precision(name: str):
    """Nothing is packed if the prompt is shorter than a group and the answer shorter than the tail."""
    method = dataclasses.replace(METHODS[name], tail=dataclasses.replace(METHODS[name].tail, length=128))
    lengths = [1, 2, 7]
    rng = np.random.default_rng(2)
    k, v, new_k, new_v = (normal(rng, 3, tokens, K, H) for tokens in (7, 7, 5, 5))
    layer = cache_of(method, k, v, np.array(lengths), 5)
    rows = naive_rows(method, k, v, lengths)
    for t in range(5):
        one = slice(t, t + 1)
        layer = APPEND(layer, new_k[:, one], new_v[:, one], np.ones(3, np.int32), np.zeros((3, 1), np.int32))
        naive_append(rows, new_k[:, one], new_v[:, one], np.ones(3, int))
    assert_same(layer, rows)
    assert int(layer.packed.length.max()) == 0
    assert_attends(layer, rows, normal(rng, 3, N, H))


def full_layer(method: Method) -> LayerCache:
    """Makes a layer with two ragged rows that are full."""
    k, v, new = (normal(np.random.default_rng(7), 2, 60, K, H) for _ in range(3))
    layer = cache_of(method, k, v, np.array([60, 31]), 40)
    room = np.asarray(layer.room())
    layer = APPEND(layer, np.repeat(new, 3, axis=1), np.repeat(new, 3, axis=1), room, np.zeros((2, 180), np.int32))
    assert (np.asarray(layer.room()) == 0).all()
    return layer


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("name", METHODS)
def test_a_token_without_room_is_dropped(name: str, tokens: int):
    """The cache stays bit-equal, for one token or many, however often they come."""
    layer = before = full_layer(METHODS[name])
    new = np.full((2, tokens, K, H), 9.0, np.float32)
    for _ in range(3):
        layer = APPEND(layer, new, new, np.array([tokens, tokens]), np.zeros((2, tokens), np.int32))
    assert (np.asarray(layer.tail.length) <= layer.tail.capacity).all()
    assert (np.asarray(layer.tokens - before.tokens) <= 1).all()  # a slot of an unpackable tail
    jax.tree.map(np.testing.assert_array_equal, layer.packed, before.packed)
    for tail, old in ((layer.tail.k, before.tail.k), (layer.tail.v, before.tail.v)):
        for b, length in enumerate(before.tail.length.tolist()):
            np.testing.assert_array_equal(tail[b, :, :length], old[b, :, :length])


@pytest.mark.parametrize("name", ["full", "kivi-sinks"])
def test_an_overflow_is_reported_where_its_values_are_known(name: str):
    """The call itself reports it, or `debug_checks` does under `jit`."""
    layer, new = full_layer(METHODS[name]), np.zeros((2, 2, K, H), np.float32)
    checked = debug_checks(append)
    for lengths, row in (([0, 2], 1), ([1, 0], 0)):
        arguments: Any = (layer, new, new, np.array(lengths), np.zeros((2, 2), np.int32))
        for call in (append, checked):
            with pytest.raises(ValueError, match=f"^append: row {row} gets {max(lengths)} tokens and has room for 0$"):
                call(*arguments)
    nothing = np.zeros(2, np.int32)
    same = checked(layer, new, new, nothing, np.zeros((2, 2), np.int32))
    jax.tree.map(np.testing.assert_array_equal, same, layer)


WRONG = {
    "heads first": (
        {"k": np.zeros((2, K, 1, H), np.float32)},
        r"k is float32\[2, 2, 1, 32\]: expected float32 \[B, T, K, H\]",
    ),
    "one KV head": ({"k": np.zeros((2, 1, 1, H), np.float32)}, r"k is float32\[2, 1, 1, 32\]: .* B=2, K=2, H=32"),
    "another batch": ({"k": np.zeros((1, 1, K, H), np.float32)}, r"k is float32\[1, 1, 2, 32\]"),
    "another dtype": ({"k": np.zeros((2, 1, K, H), np.float16)}, r"k is float16\[2, 1, 2, 32\]: expected float32"),
    "values of two tokens": ({"v": np.zeros((2, 2, K, H), np.float32)}, r"v is float32\[2, 2, 2, 32\]: .* T=1"),
    "no tokens": ({"k": np.zeros((2, 0, K, H), np.float32)}, ".*, none of size 0"),
    "a list": ({"k": [[1.0]]}, "k is a list"),
    "lengths of another batch": ({"lengths": np.ones(3, int)}, r"lengths is int64\[3\]: expected integers \[B\], B=2"),
    "fractions": ({"lengths": np.ones(2)}, r"lengths is float64\[2\]: expected integers"),
    "a negative length": ({"lengths": np.array([1, -1])}, r"lengths\[1\] is -1: expected integers in 0..1"),
    "more than T": ({"lengths": np.array([2, 1])}, r"lengths\[0\] is 2: expected integers in 0..1"),
    "positions per row": ({"positions": np.zeros(2, int)}, r"positions is int64\[2\]: expected integers \[B, T\]"),
    "no layer": ({"layer": None}, "layer is a NoneType: expected a LayerCache"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str):
    changes, message = WRONG[case]
    k = np.zeros((2, 1, K, H), np.float32)
    layer = cache_of(METHODS["minikv"], np.repeat(k, 9, axis=1), np.repeat(k, 9, axis=1), np.array([9, 2]), 9)
    arguments: Any = {"layer": layer, "k": k, "v": k, "lengths": np.ones(2, int), "positions": np.zeros((2, 1), int)}
    with pytest.raises(ValueError, match=f"^append: {message}"):
        append(**arguments | changes)


@pytest.mark.parametrize("quantized", [False, True])
def test_sliding_window_layer(quantized: bool):
    """Of the prompt, only what the next token can see is kept; later, tokens leave the window one by one."""
    window, steps, T, lengths = 40, 37, 70, [70, 12, 40]
    method = Method(quantizer=MinMax(), tail=Tail(length=16)) if quantized else Method()
    rng = np.random.default_rng(5)
    k, v, new_k, new_v = (normal(rng, 3, tokens, K, H) for tokens in (T, T, steps, steps))
    q = normal(rng, 3, N, H)
    capacity = layer_capacity(method, method.heavy, T, steps, window)

    @jax.jit
    def start(k: jax.Array, v: jax.Array, lengths: jax.Array) -> LayerCache:
        nothing = jnp.zeros((3, K, T))
        kept = select(nothing, lengths, jnp.zeros_like(lengths), method, capacity.kept, window)
        return compress(k, v, kept, capacity, LayerSpec(method, window))

    layer = start(k, v, np.array(lengths))
    kept = [list(range(max(0, n - window + 1), n)) for n in lengths]
    rows = [
        [naive.HeadCache.compress(method, k[b, :, h], v[b, :, h], positions) for h in range(K)]
        for b, positions in enumerate(kept)
    ]
    assert_same(layer, rows)
    for t in range(steps):
        now = np.array(lengths) + t
        layer = APPEND(layer, new_k[:, t : t + 1], new_v[:, t : t + 1], np.ones(3, np.int32), now[:, None])
        naive_append(rows, new_k[:, t : t + 1], new_v[:, t : t + 1], np.ones(3, int))
        if t % 12 and t != steps - 1:
            continue
        assert_same(layer, rows)
        out = np.asarray(ATTEND(q, layer, now))
        for b, row in enumerate(rows):
            positions = np.array([*kept[b], *range(lengths[b], lengths[b] + t + 1)])
            seen = positions > now[b] - window
            assert quantized or seen.sum() == min(window, now[b] + 1)
            for n in range(N):
                head = row[n // (N // K)]
                want = naive.attend(q[b, n], head.keys()[seen], head.values()[seen])
                assert_close(out[b, n], want)
