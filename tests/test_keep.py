"""Tests caches in which some KV heads keep all tokens: each head is as in a cache where all heads are like it."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import random_ids, tiny_model

import minikv_jax as mk
from minikv_jax import layerwise, meshes
from minikv_jax.cache import memory
from minikv_jax.cache.checkpoint import restore_cache, save_cache
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.state import HeadGroups
from minikv_jax.decode import decode, extend
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.kvzip import KVzip
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.models.partition import shard_model
from minikv_jax.prefill import prefill

SIZES: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256}
SIZES |= {"intermediate_size": 96}
HEADS = ((0, 1), (1, 0), (1, 2))
FEW = Method(scorer=SnapKV(), heavy=0.25, recent=0.125, sinks=2, quantizer=MinMax(k_bits=4), tail=Tail(length=32))
METHODS = {
    "packed": FEW,
    "unpacked": dataclasses.replace(FEW, quantizer=None),
    "refitted": dataclasses.replace(FEW, refit=Ridge()),
    "only sinks and a tail": Method(sinks=2, recent=0, quantizer=MinMax(), tail=Tail(length=32)),
}
LENGTHS = np.array([150, 97], np.int32)
IDS = random_ids((2, 150))
ROOM = 70


def with_heads(method: Method, heads: tuple[tuple[int, int], ...] = HEADS) -> Method:
    return dataclasses.replace(method, retrieval_heads=heads)


def compressed(model: mk.Llama, ids: jax.Array, lengths: jax.Array, method: Method, room: int) -> KVCache:
    run = nnx.jit(prefill, static_argnames=("method", "max_new_tokens", "implementation"))
    return run(model, ids, lengths, method=method, max_new_tokens=room, implementation="xla")[1]


def first_layer(method: Method, steps: int = 0) -> tuple[mk.Llama, KVCache]:
    """Keys and values of the first layer do not depend on the method."""
    model = tiny_model(**SIZES)
    cache = compressed(model, IDS, jnp.asarray(LENGTHS), method, ROOM)
    run = nnx.jit(decode, static_argnames="implementation")
    for step in range(steps):
        token = jnp.full((2,), step, jnp.int32)
        _, cache = run(model, cache, token, jnp.array([1, step % 2], jnp.int32), implementation="xla")
    return model, cache


@pytest.mark.parametrize(("name", "steps"), [*((name, 0) for name in METHODS), ("packed", 40), ("unpacked", 3)])
def test_each_head_is_cached_as_if_all_were_alike(name: str, steps: int) -> None:
    method = with_heads(METHODS[name])
    _, mixed = first_layer(method, steps)
    _, whole = first_layer(method.of_retrieval_heads, steps)
    _, few = first_layer(METHODS[name], steps)
    groups = mixed.layers[0]
    assert isinstance(groups, HeadGroups)
    assert groups.heads == ((1,), (0, 2))
    for part, heads, all_alike in zip(groups.parts, groups.heads, (whole, few), strict=True):
        got, want = jax.tree.leaves(part), jax.tree.leaves(all_alike.layers[0])
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(mine, theirs if theirs.ndim == 1 else theirs[:, heads])


def test_all_heads_of_all_layers_are_the_full_cache() -> None:
    every = tuple((layer, head) for layer in range(2) for head in range(3))
    method = with_heads(FEW, every)
    prompts = [IDS[b, :n].tolist() for b, n in enumerate(LENGTHS)]
    results = [
        mk.generate(tiny_model(**SIZES), prompts, method=m, max_new_tokens=40, log_probabilities=True)
        for m in (method, method.of_retrieval_heads)
    ]
    first, second = (np.asarray(result.log_probabilities) for result in results)
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_outputs_come_in_the_order_of_the_heads() -> None:
    """Attention of a layer whose heads see equally many tokens does not depend on how they are grouped."""
    model = tiny_model(**SIZES)
    lengths = jnp.array([20, 9], jnp.int32)  # fewer than the budgets: nothing is evicted
    method = dataclasses.replace(FEW, quantizer=None, recent=0.5, heavy=0.5)
    wanted = with_heads(method, ((0, 2), (1, 0), (1, 1)))
    for how in ("steps", "extend"):
        hidden = []
        for m in (method, wanted):
            cache = compressed(model, IDS[:, :20], lengths, m, 8)
            if how == "steps":
                out, cache = decode(model, cache, IDS[:, 20], jnp.ones(2, jnp.int32), "xla")
            else:
                out, cache = extend(model, cache, IDS[:, 20:25], jnp.array([5, 3], jnp.int32), "xla")
            hidden.append(np.asarray(out))
        np.testing.assert_allclose(hidden[0], hidden[1], atol=2e-6)


def test_layers_run_one_by_one_as_in_one_program() -> None:
    method = with_heads(FEW)
    model, expected = first_layer(method, 3)
    sizes = layerwise.shared_capacities(model.config, method, 150, ROOM)
    _, layers = layerwise.prefill_layers(model, IDS, LENGTHS, False, "xla")
    compressed = layerwise.compress_layers(model.config, method, layers, LENGTHS, LENGTHS, sizes, "xla")
    cache = compressed.cache
    assert [len(parts) for parts in compressed.kept] == [2, 2]
    for step in range(3):
        active = jnp.array([1, step % 2], jnp.int32)
        _, cache = layerwise.decode_step(model, cache, jnp.full((2,), step, jnp.int32), active, "xla")
    for got, want in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        assert got.shape == want.shape
        if got.ndim == 1:
            np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(cache.layers[1].parts[0].tail.k, expected.layers[1].parts[0].tail.k, atol=1e-5)


def test_bytes_room_rows_and_files(tmp_path: pathlib.Path) -> None:
    method = with_heads(FEW)
    model, cache = first_layer(method)
    sizes: dict[str, Any] = {"prompt_length": 150, "max_new_tokens": ROOM, "batch": 2, "dtype": "float32"}
    report = memory.report(model.config, method, **sizes)
    assert cache.nbytes == report.bytes == sum(report.layer_bytes) + 4 * 2
    assert report.bytes > memory.report(model.config, FEW, **sizes).bytes
    assert len(cache.parts) == 4
    few = np.asarray(first_layer(FEW)[1].kept_tokens)[0]
    means = [(heads * LENGTHS + (3 - heads) * few) // 3 for heads in (1, 2)]
    np.testing.assert_array_equal(cache.kept_tokens, means)
    assert cache.room() >= ROOM
    assert cache.grow(64).room() >= cache.room() + 64
    np.testing.assert_array_equal(cache.select_rows(jnp.array([1])).kept_tokens, cache.kept_tokens[:, 1:])
    save_cache(cache, tmp_path / "saved")
    restored = restore_cache(tmp_path / "saved", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(cache)
    jax.tree.map(np.testing.assert_array_equal, restored, cache)
    with pytest.raises(NotImplementedError, match="retrieval_heads on a mesh with model=3"):
        restore_cache(tmp_path / "saved", model.config, meshes.make_mesh({"model": 3}))


@pytest.mark.parametrize("quantizer", [None, MinMax()])
@pytest.mark.parametrize("change", [{"scorer": KVzip()}, {"lookahead": 8}])
def test_a_second_run_leaves_the_prompts_tokens(change: dict[str, Any], quantizer: MinMax | None) -> None:
    method = dataclasses.replace(with_heads(FEW), quantizer=quantizer, **change)
    model, short = tiny_model(**SIZES), IDS[:, :50]
    lengths = jnp.array([50, 50], jnp.int32)
    caches = [compressed(model, short, lengths, m, 4) for m in (method, method.of_retrieval_heads)]
    got, want = (jax.tree.leaves(cache.layers[0].parts[0]) for cache in caches)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs if theirs.ndim == 1 else theirs[:, (1,)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieval_heads": [(0, 1), (0, 1)]}, r"retrieval_heads=.*: \(0, 1\) comes twice: expected each head once"),
        ({"retrieval_heads": [1, 2]}, "retrieval_heads=.*: expected pairs of a layer and a KV head"),
        ({"retrieval_heads": [(0, -1)]}, "retrieval_heads=.*: expected pairs of a layer and a KV head"),
        ({"retrieval_heads": HEADS, "recent": 1.0, "heavy": 0}, "with recent=1.0: all heads keep all tokens"),
        ({"retrieval_heads": HEADS, "quantizer": None, "evict_every": 8}, "evict_every=8 with retrieval_heads="),
    ],
)
def test_wrong_heads_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FEW, **change)


def test_heads_that_the_model_lacks_are_named() -> None:
    model = tiny_model(**SIZES)
    for head, text in (((2, 0), "layer 2, head 0"), ((0, 3), "layer 0, head 3")):
        with pytest.raises(ValueError, match=f"{text}: the model has layers 0..1 and KV heads 0..2"):
            mk.generate(model, [[1, 2, 3]], method=with_heads(FEW, (head,)), max_new_tokens=1)


def test_a_mesh_splits_rows_but_not_groups_of_heads() -> None:
    model = tiny_model(**SIZES)
    prompts = [IDS[b, :n].tolist() for b, n in enumerate(LENGTHS)]
    case: dict[str, Any] = {"method": with_heads(FEW), "max_new_tokens": 4, "implementation": "xla"}
    expected = mk.generate(model, prompts, **case)
    split = shard_model(model, meshes.make_mesh({"data": 2}))
    np.testing.assert_array_equal(mk.generate(split, prompts, **case).tokens, expected.tokens)
    split = shard_model(tiny_model(**SIZES), meshes.make_mesh({"model": 3}))
    with pytest.raises(NotImplementedError, match="retrieval_heads on a mesh with model=3"):
        mk.generate(split, prompts, **case)
