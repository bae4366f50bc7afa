"""The attention ops against dense float64 softmax maps."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import naive
from support.layers import assert_close, cache_of, normal, with_garbage

from minikv_jax.methods.config import CacheConfig
from minikv_jax.ops import online_softmax as reference
from minikv_jax.ops.decode_attention import decode_attention, extend_attention, prefill_attention, quantize

HEADS = [(4, 4), (3, 1), (8, 2), (8, 1)]  # MHA; groups of 3, 4 and 8 query heads


def poison(lengths: np.ndarray, *arrays: np.ndarray) -> None:
    """NaN behind each row's length, in place."""
    for x in arrays:
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"N{heads[0]}K{heads[1]}")
def test_prefill_matches_naive(heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch):
    """Ragged rows around every edge of small blocks, NaN in the padding of q, k and v."""
    monkeypatch.setattr(reference, "BLOCK", 8)
    (N, K), H, T = heads, 16, 37
    lengths = np.array([0, 1, 7, 8, 9, 16, 36, 37])
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, len(lengths), T, count, H) for count in (N, K, K))
    poison(lengths, q, k, v)
    run = jax.jit(lambda *args: prefill_attention(*args, window=window, with_scores=True))
    out, scores = run(q, k, v, lengths)
    want_out, want_scores = naive.prefill_attention(q, k, v, lengths.tolist(), window=window)
    assert scores.dtype == jnp.float32
    assert_close(out, want_out)
    assert_close(scores, want_scores)
    assert not np.asarray(out)[np.arange(T) >= lengths[:, None]].any()
    jax.tree.map(np.testing.assert_array_equal, run(q, k, v, lengths), (out, scores))


@pytest.mark.parametrize("tokens", [reference.BLOCK - 1, reference.BLOCK, reference.BLOCK + 1, 2 * reference.BLOCK + 3])
def test_prefill_at_the_real_block_size(tokens: int):
    lengths = np.array([tokens, reference.BLOCK - 2])
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 2, tokens, count, 8) for count in (4, 2, 2))
    poison(lengths, q, k, v)
    arguments = tuple(map(jnp.asarray, (q, k, v, lengths)))
    out, scores = prefill_attention(*arguments, with_scores=True, scale=0.5)
    want_out, want_scores = naive.prefill_attention(q, k, v, lengths.tolist(), scale=0.5)
    assert_close(out, want_out)
    assert_close(scores, want_scores)
    plain, nothing = prefill_attention(*arguments, scale=0.5)
    assert nothing is None
    np.testing.assert_array_equal(plain, out)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_prefill_in_16_bits(dtype: type):
    rng = np.random.default_rng(2)
    lengths = np.array([33, 40])
    q, k, v = (normal(rng, 2, 40, count, 16).astype(dtype) for count in (6, 2, 2))
    out, scores = prefill_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths), with_scores=True
    )
    want_out, want_scores = naive.prefill_attention(q, k, v, lengths.tolist())
    assert out.dtype == dtype
    # Logits and sums are float32, so the scores are as good as ever. Weights are rounded to the dtype before they meet
    # V and the output once more: two roundings, half an eps each, of numbers below max |v| = 4.
    assert_close(scores, want_scores)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), want_out, rtol=0, atol=4 * float(ml_dtypes.finfo(dtype).eps)
    )


def test_prefill_memory_is_linear():
    """No S x S buffer: at S = 4096 one head's map in float32 would be 64 MiB."""
    tokens, heads, dim = 4096, 2, 16
    x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.float32)
    run = jax.jit(lambda q, k, v, lengths: prefill_attention(q, k, v, lengths, with_scores=True))
    memory = run.lower(x, x, x, jax.ShapeDtypeStruct((1,), jnp.int32)).compile().memory_analysis()
    assert memory is not None
    arrays = tokens * heads * dim * 4
    assert memory.temp_size_in_bytes < 16 * arrays < tokens * tokens * 4 // 4


# Decode -------------------------------------------------------------------------------------------


def naive_caches(
    config: CacheConfig, k: np.ndarray, v: np.ndarray, lengths: np.ndarray
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The keys and values that each row and KV head ends up with."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        heads = [naive.HeadCache.compress(config, k[b, :n, h], v[b, :n, h], range(n)) for h in range(k.shape[2])]
        rows.append([(cache.keys(), cache.values()) for cache in heads])
    return rows


CONFIGS = {
    "full": CacheConfig(),
    "full-sinks": CacheConfig(sinks=5),
    "2-bit": CacheConfig(k_bits=2, v_bits=2, residual_length=32),
    "2-bit-sinks": CacheConfig(k_bits=2, v_bits=2, residual_length=16, sinks=5, metadata_dtype="bfloat16"),
    "3-1-bit-float8": CacheConfig(k_bits=3, v_bits=1, residual_length=32, metadata_dtype="float8_e4m3fn"),
    "8-4-bit-kivi": CacheConfig(k_bits=8, v_bits=4, group_size=32, residual="kivi", residual_length=32, sinks=2),
    "1-3-bit-kivi": CacheConfig(
        k_bits=1, v_bits=3, residual="kivi", residual_length=32, metadata_dtype="float8_e4m3fn"
    ),
}


@pytest.mark.parametrize(
    ("name", "heads"),
    [*(("2-bit", heads) for heads in HEADS), *((name, (6, 2)) for name in CONFIGS)],
    ids=lambda value: value if isinstance(value, str) else f"N{value[0]}K{value[1]}",
)
def test_decode_matches_naive(name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Exact softmax over what is stored; rows with nothing packed, nothing in the tail, nothing at all; NaN around."""
    monkeypatch.setattr(reference, "DECODE_BLOCK", 64)  # whole blocks and a rest
    (N, K), H, T, config = heads, 32, 150, CONFIGS[name]
    lengths = np.array([0, 1, 6, 31, 32, 33, 37, 64, 65, 128, 149, 150])
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, len(lengths), N, H), normal(rng, len(lengths), T, K, H), normal(rng, len(lengths), T, K, H)
    layer = with_garbage(cache_of(config, k, v, lengths))
    if config.quantized:
        assert int(layer.packed_length.min()) == 0
        assert int(layer.packed_length.max()) > 64
        if not config.sinks and config.residual == "minikv":
            assert (np.asarray(layer.tail_length)[lengths % 32 == 0] == 0).all()
    run = jax.jit(decode_attention)
    out = run(q, layer)
    assert not np.asarray(out)[0].any()
    for b, row in enumerate(naive_caches(config, k, v, lengths)):
        for head in range(N if lengths[b] else 0):
            want = naive.attend(q[b, head], *row[head // (N // K)])
            assert_close(out[b, head], want)
    np.testing.assert_array_equal(run(q, layer), out)


@pytest.mark.parametrize("name", ["full", "2-bit-sinks", "1-3-bit-kivi"])
def test_extend_matches_naive(name: str):
    """New tokens see what is stored, as it is stored, and one another causally; padding of new tokens is NaN."""
    N, K, H, T, new, config = 6, 2, 32, 70, 9, CONFIGS[name]
    lengths, counts = np.array([0, 3, 70, 66]), np.array([9, 1, 8, 0])
    rng = np.random.default_rng(4)
    k, v = normal(rng, 4, T, K, H), normal(rng, 4, T, K, H)
    new_q, new_k, new_v = normal(rng, 4, new, N, H), normal(rng, 4, new, K, H), normal(rng, 4, new, K, H)
    poison(counts, new_q, new_k, new_v)
    layer = with_garbage(cache_of(config, k, v, lengths))
    out = jax.jit(extend_attention)(new_q, new_k, new_v, layer, counts)
    assert np.isfinite(np.asarray(out)[np.arange(new) < counts[:, None]]).all()
    for b, row in enumerate(naive_caches(config, k, v, lengths)):
        for head in range(N):
            kv_head = head // (N // K)
            keys, values = (
                np.concatenate([old, x[b, :, kv_head]]) for old, x in zip(row[kv_head], (new_k, new_v), strict=True)
            )
            for t in range(counts[b]):
                seen = slice(lengths[b] + t + 1)
                assert_close(out[b, t, head], naive.attend(new_q[b, t, head], keys[seen], values[seen]))


@pytest.mark.parametrize("name", ["full", "2-bit"])
def test_decode_in_a_sliding_window(name: str):
    """Tokens that have left the window stay stored but are not seen."""
    N, K, H, T, window, config = 4, 2, 32, 90, 50, CONFIGS[name]
    lengths = np.array([90, 20])
    rng = np.random.default_rng(5)
    q, k, v = normal(rng, 2, N, H), normal(rng, 2, T, K, H), normal(rng, 2, T, K, H)
    layer = cache_of(config, k, v, lengths)
    positions = jnp.asarray(np.broadcast_to(np.arange(T), (2, K, T)))
    if config.quantized:
        start = np.asarray(layer.packed_length)[:, None, None] + np.arange(layer.tail_capacity)
        tail, packed = jnp.broadcast_to(start, (2, K, layer.tail_capacity)), positions[:, :, : layer.packed_capacity]
    else:
        tail, packed = positions, None
    layer = dataclasses.replace(layer, window=window, packed_positions=packed, tail_positions=tail)
    now = jnp.asarray(lengths - 1)
    out = jax.jit(decode_attention)(q, layer, now)
    for b, row in enumerate(naive_caches(config, k, v, lengths)):
        seen = slice(max(0, lengths[b] - window), None)
        for head in range(N):
            keys, values = row[head // (N // K)]
            want = naive.attend(q[b, head], keys[seen], values[seen])
            assert_close(out[b, head], want)
    with pytest.raises(ValueError, match=r"positions=None.*\(50\)"):
        decode_attention(jnp.asarray(q), layer)


def test_wrong_input_is_named():
    q, k = jnp.zeros((2, 5, 4, 16)), jnp.zeros((2, 5, 2, 16))
    lengths = jnp.array([5, 2])
    layer = cache_of(
        CacheConfig(), np.zeros((2, 5, 2, 16), np.float32), np.zeros((2, 5, 2, 16), np.float32), np.array([5, 2])
    )
    cases = [
        (lambda: prefill_attention(q, k, k[:, :4], lengths), r"\(2, 5, 2, 16\), v \(2, 4, 2, 16\)"),
        (lambda: prefill_attention(q, k[:, :4], k[:, :4], lengths), r"\(2, 5, 4, 16\), k \(2, 4, 2, 16\)"),
        (lambda: prefill_attention(q[:, :, :3], k, k, lengths), "3 query heads over 2 KV heads"),
        (lambda: prefill_attention(q, k, k, lengths[:1]), r"lengths has shape \(1,\): expected \(2,\)"),
        (lambda: prefill_attention(q, k, k, lengths, window=0), "window=0"),
        (lambda: prefill_attention(q, k, k, lengths, implementation="triton"), "implementation='triton'"),
        (lambda: decode_attention(q[:1, 0], layer), "batch 1 .* the cache 2"),
        (lambda: decode_attention(q[:, 0, :, :8], layer), "head dim 8, the cache 2 and 16"),
        (lambda: decode_attention(q[:, 0, :3], layer), "3 query heads over 2 KV heads"),
        (lambda: decode_attention(q[:, 0], layer, implementation="triton"), "implementation='triton'"),
        (lambda: extend_attention(q, k, k, layer, lengths[:1]), r"lengths has shape \(1,\)"),
        (lambda: extend_attention(q[:1], k[:1], k[:1], layer, lengths[:1]), "batch 1 .* the cache 2"),
        (lambda: quantize(k, bits=None, group_size=16, axis="tokens"), "bits=None"),
        (lambda: quantize(k, bits=2, group_size=16, axis="tokens", implementation="triton"), "implementation='triton'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
