"""Tests every named method from prefill to the last decode step against the naive reference."""

import dataclasses
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive, naive_methods
from support.layers import Rows, assert_close, assert_same, naive_append
from support.projections import VOCABULARY, Projections, projections

from minikv_jax.cache import memory
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.decode import decode
from minikv_jax.methods import lookup
from minikv_jax.methods.base import NoScores, Uniform
from minikv_jax.methods.critical_kv import CriticalKV
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail, Tokens
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.models.decoder import Llama
from minikv_jax.models.rotary import inverse_frequencies
from minikv_jax.prefill import prefill

LENGTHS, BUCKET, STEPS = [150, 97, 36, 3], 160, 40


def small(method: Method) -> Method:
    """Shrinks a method to these prompts: token counts divided by 16, and a tail that fills within the steps."""
    counts = {
        name: Tokens(max(1, budget.count // 16))
        for name in ("heavy", "recent")
        if isinstance(budget := getattr(method, name), Tokens) and budget
    }
    return dataclasses.replace(method, tail=Tail(length=32, rule=method.tail.rule), **counts)


def naive_prefill(model: Projections, method: Method, ids: np.ndarray) -> tuple[np.ndarray, list[Rows]]:
    """Computes outputs[B, T, L, N, H] and each layer's caches."""
    q, k, v = (table[:, ids] for table in (model.q, model.k, model.v))
    layers = range(model.config.num_hidden_layers)
    arrays = [(q[layer], k[layer], v[layer], LENGTHS) for layer in layers]
    if isinstance(method.scorer, NoScores | H2O | SnapKV):  # a Twin is a SnapKV
        scores = [naive.prompt_scores(method, *layer) for layer in arrays]
    else:
        frequencies = np.asarray(inverse_frequencies(model.config.rope(0)))
        scores = [naive_methods.prompt_scores(method, *layer, frequencies) for layer in arrays]
    heavy = naive.heavy_tokens(method, scores, LENGTHS)
    if isinstance(method.scorer, CriticalKV):
        scores = [
            naive_methods.critical_kv(method, scores[layer], v[layer], model.o[layer], LENGTHS, heavy[layer])
            for layer in layers
        ]
    caches: list[Rows] = []
    for layer in layers:
        rows: Rows = []
        for b, n in enumerate(LENGTHS):
            row = []
            for head in range(model.config.num_key_value_heads):
                kept = naive.kept_positions(
                    scores[layer][b, head],
                    n,
                    sinks=method.sinks,
                    heavy=heavy[layer][b],
                    recent=naive.tokens_of(method.recent, n),
                )
                row.append(naive.HeadCache.compress(method, k[layer, b, :, head], v[layer, b, :, head], kept))
            rows.append(row)
        caches.append(rows)
    outs = [naive.prefill_attention(q[layer], k[layer], v[layer], LENGTHS)[0] for layer in layers]
    return np.stack(outs, axis=2), caches


OFTEN = ("minikv", "twin-4bit", "kivi-2", "snapkv", "tova", "full")  # the others are slow tests
CASES = [
    # test_quantizers.py, test_lookahead.py and test_refit.py have the others
    *(
        (name, (6, 2))
        for name in lookup.names()
        if type(lookup.get(name).quantizer) in (MinMax, type(None))
        and not lookup.get(name).runs_twice
        and lookup.get(name).refit is None
    ),
    *((name, heads) for name in ("minikv", "minikv-pyramid", "snapkv") for heads in ((3, 3), (8, 1))),
]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param(
            name,
            heads,
            id=f"{name}-N{heads[0]}K{heads[1]}",
            marks=() if name in OFTEN and heads == (6, 2) else pytest.mark.slow,
        )
        for name, heads in CASES
    ],
)
def test_method_matches_naive(name: str, heads: tuple[int, int]):
    """Kept tokens, codes and predicted bytes are equal, and attention agrees within float32's error."""
    method = small(lookup.get(name))
    model = projections(2 if method.budget == Uniform() else 4, heads)
    N, K = heads
    rng = np.random.default_rng(1)
    ids = rng.permutation(VOCABULARY)[:BUCKET] + np.zeros((len(LENGTHS), 1), np.int64)
    ids = rng.permuted(ids, axis=1)
    new_ids = rng.integers(0, VOCABULARY, (len(LENGTHS), STEPS))
    llama = cast(Llama, model)

    @jax.jit
    def run(ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        """Computes the outputs of all tokens (`prefill` returns only the last one's) and the cache."""
        outputs = []

        def forward(*arguments: Any) -> jax.Array:
            outputs.append(model.forward(*arguments))
            return outputs[0]

        parts = {name: getattr(model, name) for name in ("config", "window", "softmax_options", "output_projection")}
        recorder = types.SimpleNamespace(forward=forward, **parts)
        _, cache = prefill(cast(Llama, recorder), ids, lengths, method, STEPS)
        return outputs[0], cache

    hidden, cache = run(ids, np.array(LENGTHS))
    want, caches = naive_prefill(model, method, ids)
    valid = np.arange(BUCKET) < np.array(LENGTHS)[:, None]
    assert_close(np.asarray(hidden)[valid], want[valid], 2e-5)  # the sharpest layer's logits are twice as large
    for layer, rows in zip(cache.layers, caches, strict=True):
        assert_same(layer, rows)
    again = run(ids, np.array(LENGTHS))
    jax.tree.map(np.testing.assert_array_equal, again, (hidden, cache))

    report = memory.report(
        model.config, method, prompt_length=BUCKET, max_new_tokens=STEPS, batch=len(LENGTHS), dtype="float32"
    )
    assert cache.nbytes == report.bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    assert cache.packed_bytes == report.packed_bytes
    if method.heavy or method.sinks:
        assert (np.asarray(cache.kept_tokens)[:, 0] < LENGTHS[0]).all()

    step = jax.jit(lambda cache, token: decode(llama, cache, token, jnp.ones_like(token)), donate_argnums=0)
    for t in range(STEPS):
        hidden, cache = step(cache, new_ids[:, t])
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
    if method.quantizer is not None:
        assert all(np.asarray(layer.packed.length)[:2].min() > 0 for layer in cache.layers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minikv", "head_dim 24 is not divisible by group_size 16"),
        ("kivi-2", "head_dim 24 is not divisible by group_size 32"),
    ],
)
def test_head_dim_must_hold_groups(name: str, message: str):
    model = dataclasses.replace(projections(1, (2, 2)).config, head_dim=24)
    with pytest.raises(ValueError, match=message):
        memory.report(model, name, prompt_length=64, max_new_tokens=8)
    memory.report(model, "h2o", prompt_length=64, max_new_tokens=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (32, 32, 128)])
def test_methods_named_after_their_bytes_take_no_more(dtype: str, query_heads: int, kv_heads: int, head_dim: int):
    """At any length, a half from 512 tokens on; in 16 bits, a quarter from 4,096 and an eighth from 8,192."""
    config = dataclasses.replace(
        projections(4, (query_heads, kv_heads)).config, head_dim=head_dim, max_position_embeddings=131072
    )

    def size(name: str, prompt: int, new: int) -> int:
        return memory.report(config, name, prompt_length=prompt, max_new_tokens=new, dtype=dtype).bytes

    for prompt in (64, 256, 512, 1000, 2048, 3333, 4096, 8192, 65536):
        for new in (1, 64, 120, 128, 512):
            assert size("twin-4bit", prompt, new) <= size("minikv", prompt, new), (prompt, new)
            if prompt >= 512 and new <= 128:
                assert 2 * size("twin-4bit-half", prompt, new) <= size("minikv", prompt, new), (prompt, new)
            if dtype == "bfloat16" and new <= 120:
                if prompt >= 4096:
                    assert 4 * size("foresight-quarter", prompt, new) <= size("minikv", prompt, new), (prompt, new)
                if prompt >= 8192:
                    assert 8 * size("foresight-eighth", prompt, new) <= size("minikv", prompt, new), (prompt, new)
