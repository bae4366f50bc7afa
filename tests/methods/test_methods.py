"""Every preset as a whole, prefill to the last decode step, against the naive reference."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive, naive_schemes
from support.layers import Rows, assert_close, assert_same, naive_append
from support.projections import VOCABULARY, Projections, projections

from minikv_jax import inference
from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.rotary import inverse_frequencies

LENGTHS, BUCKET, STEPS = [150, 97, 36, 3], 160, 40


def small(config: CacheConfig) -> CacheConfig:
    """The preset at the size of these prompts: token counts over 16, and a tail that fills within the steps."""
    counts = {
        name: max(1, getattr(config, name) // 16)
        for name in ("heavy", "recent")
        if isinstance(getattr(config, name), int) and getattr(config, name)
    }
    return dataclasses.replace(config, residual_length=32, **counts)


def naive_prefill(model: Projections, config: CacheConfig, ids: np.ndarray) -> tuple[np.ndarray, list[Rows]]:
    """Outputs[B, T, L, N, H] and each layer's caches."""
    q, k, v = (table[:, ids] for table in (model.q, model.k, model.v))
    layers = range(model.config.num_hidden_layers)
    arrays = [(q[layer], k[layer], v[layer], LENGTHS) for layer in layers]
    if config.scorer in ("none", "cumulative", "window", "twin-window"):
        scores = [naive.prompt_scores(config, *layer) for layer in arrays]
    else:
        frequencies = inverse_frequencies(model.config)
        scores = [naive_schemes.prompt_scores(config, *layer, frequencies) for layer in arrays]
    heavy = naive.heavy_tokens(config, scores, LENGTHS)
    caches: list[Rows] = []
    for layer in layers:
        rows: Rows = []
        for b, n in enumerate(LENGTHS):
            row = []
            for head in range(model.config.num_key_value_heads):
                kept = naive.kept_positions(
                    scores[layer][b, head],
                    n,
                    sinks=config.sinks,
                    heavy=heavy[layer][b],
                    recent=naive.tokens_of(config.recent, n),
                )
                row.append(naive.HeadCache.compress(config, k[layer, b, :, head], v[layer, b, :, head], kept))
            rows.append(row)
        caches.append(rows)
    outs = [naive.prefill_attention(q[layer], k[layer], v[layer], LENGTHS)[0] for layer in layers]
    return np.stack(outs, axis=2), caches


CASES = [
    # test_quantizers.py has the others
    *((name, (6, 2)) for name in presets.names() if presets.get(name).quantizer == "minmax"),
    *((name, heads) for name in ("minikv", "minikv-pyramid", "snapkv") for heads in ((3, 3), (8, 1))),
]


@pytest.mark.parametrize(("name", "heads"), CASES, ids=[f"{name}-N{N}K{K}" for name, (N, K) in CASES])
def test_method_matches_naive(name: str, heads: tuple[int, int]):
    """The same tokens kept, the same codes, the same bytes as foretold, and attention within float32 error."""
    config = small(presets.get(name))
    model = projections(2 if config.budget == "uniform" else 4, heads)
    N, K = heads
    rng = np.random.default_rng(1)
    ids = rng.permutation(VOCABULARY)[:BUCKET] + np.zeros((len(LENGTHS), 1), np.int64)
    ids = rng.permuted(ids, axis=1)
    new_ids = rng.integers(0, VOCABULARY, (len(LENGTHS), STEPS))
    llama = cast(Llama, model)

    @jax.jit
    def prefill(ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        compressor = inference.Compressor(llama.config, config, BUCKET, STEPS)
        hidden = inference.run_prompt(llama, ids, lengths, compressor.add, compressor.needs_column_sums)
        return hidden, compressor.cache(lengths)

    hidden, cache = prefill(ids, np.array(LENGTHS))
    want, caches = naive_prefill(model, config, ids)
    valid = np.arange(BUCKET) < np.array(LENGTHS)[:, None]
    assert_close(np.asarray(hidden)[valid], want[valid], 2e-5)  # the sharpest layer's logits are twice as large
    for layer, rows in zip(cache.layers, caches, strict=True):
        assert_same(layer, rows)
    again = prefill(ids, np.array(LENGTHS))
    jax.tree.map(np.testing.assert_array_equal, again, (hidden, cache))

    report = memory.report(
        model.config, config, prompt_length=BUCKET, max_new_tokens=STEPS, batch=len(LENGTHS), dtype="float32"
    )
    assert cache.nbytes == report.bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    assert cache.packed_bytes == report.packed_bytes
    if config.heavy or config.sinks:
        assert (np.asarray(cache.kept_tokens)[:, 0] < LENGTHS[0]).all()

    decode = jax.jit(lambda cache, token: inference.decode(llama, cache, token, jnp.ones_like(token)), donate_argnums=0)
    for t in range(STEPS):
        hidden, cache = decode(cache, new_ids[:, t])
        for layer, rows in enumerate(caches):
            k, v = (table[layer][new_ids[:, t]][:, None] for table in (model.k, model.v))
            naive_append(rows, k, v, np.ones(len(LENGTHS), int))
            if t % 13:
                continue
            assert_same(cache.layers[layer], rows)
            for b, row in enumerate(rows):
                stored = [(head.keys(), head.values()) for head in row]
                for n in range(N):
                    out = naive.attend(model.q[layer, new_ids[b, t], n], *stored[n // (N // K)])
                    assert_close(hidden[b, layer, n], out, 2e-5)
    for layer, rows in zip(cache.layers, caches, strict=True):
        assert_same(layer, rows)
    assert cache.length.tolist() == [n + STEPS for n in LENGTHS]
    if config.quantized:
        assert all(np.asarray(layer.packed_length)[:2].min() > 0 for layer in cache.layers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (presets.get("minikv"), "head_dim 24 is not divisible by group_size 16"),
        (presets.get("kivi-2"), "head_dim 24 is not divisible by group_size 32"),
    ],
)
def test_head_dim_must_hold_groups(config: CacheConfig, message: str):
    model = dataclasses.replace(projections(1, (2, 2)).config, head_dim=24)
    with pytest.raises(ValueError, match=message):
        memory.report(model, config, prompt_length=64, max_new_tokens=8)
    memory.report(model, presets.get("h2o"), prompt_length=64, max_new_tokens=8)


def test_presets_are_found_and_changed_by_name():
    assert set(presets.names()) >= {
        *("full", "kivi-2", "kivi-4", "h2o", "snapkv", "pyramidkv", "streaming-llm", "q-hitter"),
        *("minikv", "minikv-pyramid", "minikv-variance", "minikv-snap"),
    }
    assert all(presets.get(name).name == name and presets.get(name).citation for name in presets.names())
    with pytest.raises(ValueError, match=r"'minikw'.*minikv-pyramid"):
        presets.get("minikw")
    settings = {"heavy": "512", "recent": "0.5", "k_bits": "none", "v_bits": "none", "pooling": "mean"}
    changed = presets.override(presets.get("minikv"), settings)
    assert (changed.heavy, changed.recent, changed.k_bits, changed.pooling) == (512, 0.5, None, "mean")
    assert isinstance(changed.heavy, int)
    for wrong, message in (
        ({"haevy": "1"}, "'haevy'"),
        ({"sinks": "few"}, "sinks='few'"),
        ({"heavy": "2.5"}, "heavy=2.5"),
        ({"heavy": 0.3}, "heavy=0.3: expected text"),
    ):
        with pytest.raises(ValueError, match=message):
            presets.override(presets.get("minikv"), wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (32, 32, 128)])
def test_twin_presets_take_no_more_bytes_than_minikv(dtype: str, query_heads: int, kv_heads: int, head_dim: int):
    """At any prompt length, and half as many from 512 tokens on with at most 128 new ones; the tail is counted."""
    config = dataclasses.replace(
        projections(4, (query_heads, kv_heads)).config, head_dim=head_dim, max_position_embeddings=131072
    )

    def size(name: str, prompt: int, new: int) -> int:
        method = presets.get(name)
        return memory.report(config, method, prompt_length=prompt, max_new_tokens=new, dtype=dtype).bytes

    for prompt in (64, 256, 512, 1000, 2048, 3333, 4096, 8192, 65536):
        for new in (1, 64, 120, 128, 512):
            assert size("twin-4bit", prompt, new) <= size("minikv", prompt, new), (prompt, new)
            if prompt >= 512 and new <= 128:
                assert 2 * size("twin-4bit-half", prompt, new) <= size("minikv", prompt, new), (prompt, new)
