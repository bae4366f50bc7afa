"""Tests decode attention over a cache against dense float64 softmax maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive
from support.layers import assert_close, cache_of, naive_rows, normal, stored, with_garbage

from minikv_jax.cache.spec import LayerSpec
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.decode_attention import decode_attention, decode_attention_weights

HEADS = [(4, 4), (3, 1), (8, 2), (8, 1)]  # MHA; groups of 3, 4 and 8 query heads

METHODS = {
    "full": Method(),
    "full-sinks": Method(sinks=5),
    "2-bit": Method(quantizer=MinMax(), tail=Tail(length=32)),
    "2-bit-sinks": Method(quantizer=MinMax(metadata_dtype="bfloat16"), tail=Tail(length=16), sinks=5),
    "3-1-bit-float8": Method(
        quantizer=MinMax(k_bits=3, v_bits=1, metadata_dtype="float8_e4m3fn"), tail=Tail(length=32)
    ),
    "8-4-bit-kivi": Method(
        quantizer=MinMax(k_bits=8, v_bits=4, group_size=32), tail=Tail(length=32, rule="kivi"), sinks=2
    ),
    "1-3-bit-kivi": Method(
        quantizer=MinMax(k_bits=1, v_bits=3, metadata_dtype="float8_e4m3fn"), tail=Tail(length=32, rule="kivi")
    ),
}


@pytest.mark.parametrize(
    ("name", "heads"),
    [*(("2-bit", heads) for heads in HEADS), *((name, (6, 2)) for name in METHODS)],
    ids=lambda value: value if isinstance(value, str) else f"N{value[0]}K{value[1]}",
)
def test_decode_matches_naive(name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Rows may have nothing packed, no tail, or nothing at all; unused slots hold NaN."""
    monkeypatch.setattr("minikv_jax.ops.decode_attention.BLOCK", 64)  # whole blocks and a rest
    (N, K), H, T, method = heads, 32, 150, METHODS[name]
    lengths = np.array([0, 1, 6, 31, 32, 33, 37, 64, 65, 128, 149, 150])
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, len(lengths), N, H), normal(rng, len(lengths), T, K, H), normal(rng, len(lengths), T, K, H)
    layer = with_garbage(cache_of(method, k, v, lengths))
    if method.quantizer:
        assert int(layer.packed.length.min()) == 0
        assert int(layer.packed.length.max()) > 64
        if not method.sinks and method.tail.rule == "minikv":
            assert (np.asarray(layer.tail.length)[lengths % 32 == 0] == 0).all()
    run = jax.jit(decode_attention)
    out = np.asarray(run(q, layer))
    assert not out[0].any()
    for b, row in enumerate(stored(naive_rows(method, k, v, lengths.tolist()))):
        for head in range(N if lengths[b] else 0):
            want = naive.attend(q[b, head], *row[head // (N // K)])
            assert_close(out[b, head], want)
    np.testing.assert_array_equal(run(q, layer), out)


@pytest.mark.parametrize("name", ["full", "2-bit"])
def test_decode_in_a_sliding_window(name: str):
    """Tokens outside the window stay stored but are not seen."""
    N, K, H, T, window, method = 4, 2, 32, 90, 50, METHODS[name]
    lengths = np.array([90, 20])
    rng = np.random.default_rng(5)
    q, k, v = normal(rng, 2, N, H), normal(rng, 2, T, K, H), normal(rng, 2, T, K, H)
    layer = cache_of(method, k, v, lengths)
    positions = jnp.asarray(np.broadcast_to(np.arange(T), (2, K, T)))
    if method.quantizer:
        start = np.asarray(layer.packed.length)[:, None, None] + np.arange(layer.tail.capacity)
        tail, packed = jnp.broadcast_to(start, (2, K, layer.tail.capacity)), positions[:, :, : layer.packed.capacity]
    else:
        tail, packed = positions, None
    layer = dataclasses.replace(
        layer,
        packed=dataclasses.replace(layer.packed, positions=packed),
        tail=dataclasses.replace(layer.tail, positions=tail),
        spec=LayerSpec(method, window),
    )
    now = jnp.asarray(lengths - 1)
    out = np.asarray(jax.jit(decode_attention)(q, layer, now))
    for b, row in enumerate(stored(naive_rows(method, k, v, lengths.tolist()))):
        seen = slice(max(0, lengths[b] - window), None)
        for head in range(N):
            keys, values = row[head // (N // K)]
            want = naive.attend(q[b, head], keys[seen], values[seen])
            assert_close(out[b, head], want)
    with pytest.raises(ValueError, match=r"positions=None.*\(50\)"):
        decode_attention(jnp.asarray(q), layer)


def test_weights_are_those_of_the_softmax():
    """They are summed over a KV head's query heads and zero in empty slots; the output is `decode_attention`'s."""
    N, K, H, T = 6, 2, 32, 40
    lengths, rng = np.array([0, 1, 40, 23]), np.random.default_rng(6)
    q, k, v = normal(rng, 4, N, H), normal(rng, 4, T, K, H), normal(rng, 4, T, K, H)
    layer = with_garbage(cache_of(Method(), k, v, lengths))
    out, weights = map(np.asarray, jax.jit(decode_attention_weights)(q, layer))
    np.testing.assert_array_equal(out, jax.jit(decode_attention)(q, layer))
    for b, n in enumerate(lengths.tolist()):
        assert not weights[b, :, n:].any()
        for head in range(K if n else 0):
            each = [naive.softmax(k[b, :n, head].astype(np.float64) @ q[b, 3 * head + g] * H**-0.5) for g in range(3)]
            assert_close(weights[b, head, :n], np.sum(each, axis=0))


def test_wrong_input_is_named():
    q, zeros = jnp.zeros((2, 4, 16)), np.zeros((2, 5, 2, 16), np.float32)
    layer = cache_of(Method(), zeros, zeros, np.array([5, 2]))
    cases = [
        (
            lambda: decode_attention(q[:1], layer),
            r"decode_attention: q is float32\[1, 4, 16\]: expected float32 \[B, N, H\], B=2",
        ),
        (
            lambda: decode_attention(q[:, :, :8], layer),
            r"q is float32\[2, 4, 8\]: expected float32 \[B, N, H\], B=2, H=16",
        ),
        (lambda: decode_attention(q[:, :3], layer), "3 query heads over 2 KV heads"),
        (lambda: decode_attention(q, layer, implementation="triton"), "implementation='triton'.*xla"),
        (lambda: decode_attention_weights(q[:, :3], layer), "3 query heads over 2 KV heads"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
