"""Tests attention by chunks: prefill, its scores and what a cache keeps, against masks made by hand."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import assert_close, normal
from support.tiny import random_ids, tiny_model

from minikv_jax.cache.checkpoint import restore_cache, save_cache
from minikv_jax.generate import generate
from minikv_jax.models.windows import Chunk, oldest
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.window_votes import window_votes
from minikv_jax.prefill import prefill

PREFILL = jax.jit(prefill_attention, static_argnames=("window", "with_scores", "implementation"))
CHUNKED = {"layer_types": ("chunked_attention", "full_attention"), "attention_chunk_size": 6}


def test_a_query_sees_its_own_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minikv_jax.ops.prefill_attention.BLOCK", 8)
    rng, T, lengths = np.random.default_rng(0), 23, np.array([23, 12])
    q, k, v = normal(rng, 2, T, 4, 16), normal(rng, 2, T, 2, 16), normal(rng, 2, T, 2, 16)
    out, sums = PREFILL(q, k, v, lengths, window=Chunk(6), with_scores=True)
    positions = np.arange(T)
    seen = (positions <= positions[:, None]) & (positions // 6 == positions[:, None] // 6)
    assert all((oldest(Chunk(6), t) <= s <= t) == seen[t, s] for t in range(T) for s in range(T))
    for b, n in enumerate(lengths):
        logits = np.einsum("qnh,snh->nqs", q[b, :n], np.repeat(k[b, :n], 2, axis=1), dtype=np.float64) / 4
        weights = np.where(seen[:n, :n], np.exp(logits), 0)
        weights /= weights.sum(-1, keepdims=True)
        assert_close(out[b, :n], np.einsum("nqs,snh->qnh", weights, np.repeat(v[b, :n], 2, axis=1)))
        assert_close(sums[b, :, :n], weights.sum(axis=1).reshape(2, 2, n).sum(axis=1))
    assert_close(jax.jit(functools.partial(window_votes, sizes=(40,), window=Chunk(6)))(q, k, lengths)[0], sums)


@pytest.mark.parametrize("implementation", ["pallas", "cuda"])
def test_kernels_refuse_chunks_by_name(implementation: str):
    x = np.ones((1, 16, 2, 64), np.float16)
    with pytest.raises(NotImplementedError, match=r"window=Chunk\(size=6\): the kernels support sliding windows only"):
        PREFILL(x, x, x, np.array([16]), window=Chunk(6), implementation=implementation)


@pytest.mark.slow
def test_a_cache_holds_the_newest_chunk_and_is_restored(tmp_path: pathlib.Path):
    """A prompt in two parts gives the tokens of the whole one, wherever the second begins in a chunk."""
    model = tiny_model(**CHUNKED)
    ids = random_ids((1, 21))
    want = generate(model, ids, method="full", max_new_tokens=9, eos_token_ids=())
    for first in (16, 18, 20):
        _, begun = prefill(model, ids[:, :first], jnp.array([first]), "full", 24)
        assert begun.parts[0].tail.length[0] == first % 6
        save_cache(begun, tmp_path / str(first))
        cache = restore_cache(tmp_path / str(first), model.config)
        assert cache.layers[0].spec.window == Chunk(6)
        got = generate(model, ids[:, first:], cache=cache, max_new_tokens=9, eos_token_ids=())
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_chunk_sizes_and_layer_types_must_agree():
    with pytest.raises(ValueError, match="attention_chunk_size=None disagrees"):
        tiny_model(layer_types=CHUNKED["layer_types"])
    with pytest.raises(ValueError, match="attention_chunk_size=6 disagrees"):
        tiny_model(layer_types=("full_attention", "full_attention"), attention_chunk_size=6)
