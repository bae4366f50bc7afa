"""Tests prefill attention and its column sums against dense float64 softmax maps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import naive
from support.layers import assert_close, normal, poison

from minikv_jax.ops.prefill_attention import BLOCK, prefill_attention

ATTEND = jax.jit(prefill_attention, static_argnames=("scale", "with_scores"))
HEADS = [(4, 4), (3, 1), (8, 2), (8, 1)]  # MHA; groups of 3, 4 and 8 query heads


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"N{heads[0]}K{heads[1]}")
def test_prefill_matches_naive(heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch):
    """Rows end around every edge of small blocks, with NaN in the padding of q, k and v."""
    monkeypatch.setattr("minikv_jax.ops.prefill_attention.BLOCK", 8)
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


@pytest.mark.parametrize("tokens", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_prefill_at_the_real_block_size(tokens: int):
    lengths = np.array([tokens, BLOCK - 2])
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 2, tokens, count, 8) for count in (4, 2, 2))
    poison(lengths, q, k, v)
    out, scores = ATTEND(q, k, v, lengths, with_scores=True, scale=0.5)
    want_out, want_scores = naive.prefill_attention(q, k, v, lengths.tolist(), scale=0.5)
    assert_close(out, want_out)
    assert_close(scores, want_scores)
    plain, nothing = ATTEND(q, k, v, lengths, scale=0.5)
    assert nothing is None
    np.testing.assert_array_equal(plain, out)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_prefill_in_16_bits(dtype: type):
    rng = np.random.default_rng(2)
    lengths = np.array([33, 40])
    q, k, v = (normal(rng, 2, 40, count, 16).astype(dtype) for count in (6, 2, 2))
    out, scores = ATTEND(q, k, v, lengths, with_scores=True)
    want_out, want_scores = naive.prefill_attention(q, k, v, lengths.tolist())
    assert out.dtype == dtype
    # Logits and sums are float32, so the scores are as exact. Weights are rounded to the dtype before they meet
    # V and the output once more: two roundings, half an eps each, of numbers below max |v| = 4.
    assert_close(scores, want_scores)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), want_out, rtol=0, atol=4 * float(ml_dtypes.finfo(dtype).eps)
    )


def test_prefill_memory_is_linear():
    """There is no S x S buffer: at S = 4096, one head's float32 map would take 64 MiB."""
    tokens, heads, dim = 4096, 2, 16
    x = jax.ShapeDtypeStruct((1, tokens, heads, dim), jnp.float32)
    run = jax.jit(lambda q, k, v, lengths: prefill_attention(q, k, v, lengths, with_scores=True))
    memory = run.lower(x, x, x, jax.ShapeDtypeStruct((1,), jnp.int32)).compile().memory_analysis()
    assert memory is not None
    arrays = tokens * heads * dim * 4
    assert memory.temp_size_in_bytes < 16 * arrays < tokens * tokens * 4 // 4


Q, KV, LENGTHS = jnp.zeros((2, 5, 4, 16)), jnp.zeros((2, 5, 2, 16)), jnp.array([5, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prefill_attention(Q, KV, KV[:, :4], LENGTHS),
            r"v is float32\[2, 4, 2, 16\]: expected float32 \[B, T, K, H\], B=2, T=5, K=2, H=16",
        ),
        (
            lambda: prefill_attention(Q, KV[:, :4], KV[:, :4], LENGTHS),
            r"k is float32\[2, 4, 2, 16\]: expected .* T=5, H=16",
        ),
        (lambda: prefill_attention(Q[:, :, :3], KV, KV, LENGTHS), "3 query heads over 2 KV heads: expected a multiple"),
        (lambda: prefill_attention(Q, KV, KV, LENGTHS[:1]), r"lengths is int32\[1\]: expected integers \[B\], B=2"),
        (lambda: prefill_attention(Q, KV, KV, LENGTHS, window=0), "window=0: expected at least 1"),
        (lambda: prefill_attention(Q, KV, KV, LENGTHS, implementation="triton"), "implementation='triton'.*xla"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        call()
