"""Tests generation on a mesh: the same tokens, caches and log-probabilities, and minimal communication."""

import functools
import pathlib
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import tiny_config, tiny_model

from minikv_jax import meshes
from minikv_jax.cache.checkpoint import restore_cache, save_cache
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.generate import compile_ahead, generate, stream
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Uniform
from minikv_jax.models.decoder import Llama
from minikv_jax.models.partition import shard_model
from minikv_jax.programs import Programs, State
from minikv_jax.sampling import Sampling

ROWS, NEW = 8, 40
SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 96}
SIZES |= {"max_position_embeddings": 512}
MESHES = ("data=8", "model=8", "data=2,model=4", "data=4,model=2")
# Sums over devices have another order. A number on the edge between two codes may then get the other one, which
# changes the rest of its row a little.
ROUNDING, ONE_CODE = 2e-5, 0.02


def layers_for(method: str) -> int:
    """Layers that show what a method does: two if it spreads a budget over them."""
    return 1 if isinstance(lookup.get(method).budget, Uniform) else 2


@functools.cache
def model(layers: int = 1) -> Llama:
    return tiny_model(**SIZES, num_hidden_layers=layers)


def mesh_of(text: str) -> jax.sharding.Mesh:
    return meshes.make_mesh(meshes.parse(text))


def prompts(rows: int = ROWS, longest: int = 96) -> list[list[int]]:
    """Rows without repeated tokens, as some scores do not depend on position and rounding would break the tie."""
    rng = np.random.default_rng(5)
    return [rng.permutation(96)[:size].tolist() for size in rng.integers(longest // 2, longest, rows)]


def compiled(on: Llama, method: str) -> Programs:
    return compile_ahead(on, ROWS, 96, method=method, max_new_tokens=NEW, eos_token_ids=(), log_probabilities=True)


def run(programs: Programs, on: Llama) -> tuple[KVCache, State]:
    """Runs prefill and decoding; returns the prompts' cache on the host and the last state."""
    rows = prompts()
    ids = np.zeros((ROWS, 96), np.int32)
    for at, row in zip(ids, rows, strict=True):
        at[: len(row)] = row
    inputs: Any = ids, np.array([len(row) for row in rows], np.int32)
    key: Any = jax.random.key(0)
    if on.mesh is not None:
        inputs, key = meshes.place(inputs, on.mesh, meshes.DATA), meshes.place(key, on.mesh)
    params = nnx.state(on)
    state = programs.prefill(params, None, *inputs, key)
    prompt = jax.tree.map(np.asarray, state.cache)
    return prompt, programs.decode(params, state, np.int32(NEW))


@functools.cache
def on_one_device(method: str) -> tuple[KVCache, State]:
    whole = model(layers_for(method))
    return run(compiled(whole, method), whole)


def communication(program: jax.stages.Compiled) -> Counter[str]:
    """Lists the collectives of a compiled program by kind and shape."""
    found = re.findall(
        r"= (\(?\w+\[[^=]*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text() or ""
    )
    return Counter(f"{kind} {re.sub(r'{[^}]*}', '', shape)}" for shape, kind in found)


def expected_communication(data: int, shards: int, layers: int = 1) -> Counter[str]:
    """Lists two sums per layer, each device's logits, and whether any row continues."""
    rows = ROWS // data
    expected: Counter[str] = Counter()
    if shards > 1:
        expected[f"all-reduce f32[{rows},1,48]"] = 2 * layers
        expected[f"all-gather f32[{rows},96]"] = 1
    if data > 1:
        expected["all-reduce pred[]"] = 1
    return expected


def stored(cache: KVCache) -> list[np.ndarray]:
    """Dequantised keys of a cache, which identify its tokens."""
    out = []
    for layer in cache.parts:
        if layer.packed.capacity:
            keys, _ = layer.packed_tokens(0, layer.packed.capacity, np.float32)
            seen = np.arange(layer.packed.capacity) < np.asarray(layer.packed.length)[:, None]
            out.append(np.where(seen[:, None, :, None], keys, 0))
        seen = np.arange(layer.tail.capacity) < np.asarray(layer.tail.length)[:, None]
        out.append(np.where(seen[:, None, :, None], layer.tail.k, 0))
    return out


def check(method: str, mesh: str) -> None:
    on = shard_model(model(layers_for(method)), mesh_of(mesh))
    programs = compiled(on, method)
    prompt, state = run(programs, on)
    expected_prompt, expected = on_one_device(method)
    np.testing.assert_array_equal(state.cache.length, expected.cache.length)
    quantised = lookup.get(method).quantizer is not None
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    off = np.abs(np.asarray(state.log_probabilities) - np.asarray(expected.log_probabilities))
    assert off.max() <= (ONE_CODE if quantised else ROUNDING)
    assert (off > ROUNDING).mean() <= (0.25 if quantised else 0)
    for ours, theirs in zip(stored(prompt), stored(expected_prompt), strict=True):
        off = np.abs(ours - theirs) > 1e-4 * np.abs(theirs).max(initial=1.0)
        assert off.mean() <= (1e-3 if quantised else 0)
    sizes = meshes.parse(mesh)
    shards, data = sizes.get("model", 1), sizes.get("data", 1)
    assert communication(programs.decode) == expected_communication(data, shards, layers_for(method))
    for leaf in jax.tree.leaves(state.cache):  # every part where it belongs
        part = leaf.addressable_shards[0].data.shape
        assert part == (leaf.shape[0] // data, *(n // shards for n in leaf.shape[1:2]), *leaf.shape[2:])


@pytest.mark.parametrize("mesh", ["data=2,model=4", "model=8"])
def test_minikv_on_a_mesh(mesh: str):
    check("minikv", mesh)


@pytest.mark.campaign
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", list(lookup.names()))
def test_every_method_on_every_mesh(method: str, mesh: str):
    check(method, mesh)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", ["data", "model"])
@pytest.mark.parametrize(
    ("implementation", "dtype", "steps", "tolerance"), [("xla", "float32", NEW, ONE_CODE), ("cuda", "bfloat16", 1, 0.1)]
)
def test_all_gpus_draw_what_one_draws(axis: str, implementation: str, dtype: str, steps: int, tolerance: float):
    """Log-probabilities agree up to each row's first other token. In bfloat16, 2-bit codes make later steps differ."""
    whole = tiny_model(dtype=dtype, **SIZES | {"head_dim": 64})
    split = shard_model(whole, meshes.make_mesh({axis: jax.device_count()}))
    how: dict[str, Any] = {"method": "minikv", "max_new_tokens": NEW, "eos_token_ids": (), "log_probabilities": True}
    one, ours = (generate(on, prompts(), implementation=implementation, **how) for on in (whole, split))
    assert ours.cache.nbytes == one.cache.nbytes
    theirs, found = np.asarray(one.log_probabilities), np.asarray(ours.log_probabilities)
    same = np.logical_and.accumulate(np.asarray(one.tokens) == np.asarray(ours.tokens), axis=1)
    compared = np.concatenate([np.ones_like(same[:, :1]), same[:, :-1]], axis=1)  # the first other token too
    assert np.isfinite(found).all()
    assert np.abs(found - theirs)[:, :steps][compared[:, :steps]].max() <= tolerance


def test_a_tied_vocabulary_costs_one_sum_more():
    """The additional sum looks up the drawn token."""
    on = shard_model(tiny_model(**SIZES, num_hidden_layers=1, tie_word_embeddings=True), mesh_of("model=8"))
    found = communication(compiled(on, "minikv").decode)
    assert found - expected_communication(1, 8) == Counter({f"all-reduce f32[{ROWS},1,48]": 1})


def test_sampling_streaming_and_going_on():
    on = shard_model(model(), mesh_of("data=2,model=4"))
    how: dict[str, Any] = {"max_new_tokens": 24, "eos_token_ids": (3,), "log_probabilities": True}
    how |= {"sampling": Sampling(temperature=1.0, top_p=0.9), "key": jax.random.key(3)}
    expected, result = (generate(of, prompts(), method="minikv", **how) for of in (model(), on))
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    *_, last = stream(on, prompts(), method="minikv", chunk=7, **how)
    np.testing.assert_array_equal(last.tokens, expected.tokens)
    more = [row[:11] for row in prompts()]
    second, again = (
        generate(of, more, cache=cache, **how) for of, cache in ((model(), expected.cache), (on, last.cache))
    )
    np.testing.assert_array_equal(again.tokens, second.tokens)
    assert again.log_probabilities is not None and second.log_probabilities is not None
    np.testing.assert_allclose(again.log_probabilities, second.log_probabilities, atol=ONE_CODE)


def test_drafts_and_refits_on_a_mesh():
    method = lookup.parse("minikv-snap:lookahead=3,refit=ridge,queries=8,strength=0.1,tail.length=32")
    how: dict[str, Any] = {"method": method, "max_new_tokens": 6, "eos_token_ids": (), "log_probabilities": True}
    expected = generate(model(), prompts(), **how)
    got = generate(shard_model(model(), mesh_of("data=2,model=4")), prompts(), **how)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    off = np.abs(np.asarray(got.log_probabilities) - np.asarray(expected.log_probabilities))
    assert off.max() <= ONE_CODE


def test_prompts_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch):
    """Each device prefills its own rows, a few at a time."""
    on = shard_model(model(), mesh_of("data=2,model=4"))
    expected = generate(model(), prompts(), method="h2o", max_new_tokens=4)
    jax.clear_caches()
    for module in ("minikv_jax.prefill", "minikv_jax.models.decoder"):
        monkeypatch.setattr(sys.modules[module], "CHUNK_TOKENS", 96 * 3)
    result = generate(on, prompts(), method="h2o", max_new_tokens=4)
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    jax.clear_caches()


def test_a_cache_moves_between_meshes(tmp_path: pathlib.Path):
    """A cache moves through a file or directly, and its rows can be selected."""
    config = tiny_config(**SIZES, num_hidden_layers=1)
    how: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": ()}
    on, elsewhere = shard_model(model(), mesh_of("data=2,model=4")), shard_model(model(), mesh_of("data=4,model=2"))
    cache = generate(on, prompts(), method="minikv", **how).cache
    save_cache(cache, tmp_path / "cache")
    rows = jnp.array([1, 1, 0, 7, 6, 5, 4, 2])
    assert elsewhere.mesh is not None
    moved = meshes.place_cache(cache.select_rows(rows), elsewhere.mesh)
    restored = restore_cache(tmp_path / "cache", config, elsewhere.mesh).select_rows(rows)
    alone = restore_cache(tmp_path / "cache", config).select_rows(rows)
    more = [row[:9] for row in prompts()]
    results = [
        generate(of, more, cache=cache, **how)
        for of, cache in ((elsewhere, moved), (elsewhere, restored), (model(), alone))
    ]
    for result in results[:2]:
        np.testing.assert_array_equal(result.tokens, results[2].tokens)


def test_what_does_not_fit_a_mesh_is_refused():
    on = shard_model(model(), mesh_of("data=2,model=4"))
    with pytest.raises(ValueError, match="3 rows on a mesh with data=2: expected a multiple"):
        generate(on, prompts(3), method="minikv")
    with pytest.raises(ValueError, match="3 rows on a mesh with data=2"):
        compile_ahead(on, 3, 64)
    cache = generate(model(), prompts(2), method="full", max_new_tokens=2).cache
    with pytest.raises(ValueError, match=r"cache is on 1 devices, the model on 8: place_cache"):
        generate(on, prompts(2), cache=cache)
    with pytest.raises(ValueError, match="2 rows on a mesh with data=8: expected a multiple"):
        meshes.place_cache(cache, mesh_of("data=8"))
    with (
        meshes.use(mesh_of("model=8")),
        pytest.raises(ValueError, match="a mesh is set, but the model is on one device"),
    ):
        generate(model(), prompts(2))
