"""Tests prefill: chunks and their memory, single layers, and every setting of a method."""

import dataclasses
import functools
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.projections import VOCABULARY, projections
from support.tiny import random_ids, tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.state import LayerCache
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Component, settings
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.lagkv import LagKV
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.minikv import Variance
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.quarot import Hadamard
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.models.decoder import Llama
from minikv_jax.prefill import last_valid, layer_inputs, prefill, prefill_layer

MINIKV32 = dataclasses.replace(lookup.get("minikv"), tail=Tail(length=32))


def test_last_valid():
    hidden = jnp.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(last_valid(hidden, jnp.asarray([1, 4])), [[0, 1, 2], [21, 22, 23]])


# Chunks -------------------------------------------------------------------------------------------


def at_a_time(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    for module in ("minikv_jax.models.decoder", "minikv_jax.prefill"):
        monkeypatch.setattr(sys.modules[module], "CHUNK_TOKENS", tokens)  # of the module: `mk.prefill` is a function


def run(model: mk.Llama, method: Method, lengths: list[int], tokens: int) -> tuple[jax.Array, KVCache]:
    once = jax.jit(lambda ids, lengths: prefill(model, ids, lengths, method, 40))  # traced again at every call
    return once(random_ids((len(lengths), tokens)), jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize(
    ("method", "chunk"),
    [(lookup.get("full"), 50), (MINIKV32, 50), (MINIKV32, 160), (lookup.get("minikv-variance"), 160)],
    ids=["full-50", "minikv-50", "minikv-160", "minikv-variance-160"],
)
def test_chunks_equal_one_run(method: Method, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Seven ragged rows of up to 64 tokens run two or one at a time; chunks of 50 split a row of the MLP."""
    model = tiny_model(max_position_embeddings=512)
    lengths = [64, 3, 50, 17, 64, 1, 33]
    hidden, cache = run(model, method, lengths, 64)
    at_a_time(monkeypatch, chunk)
    hidden_by_chunks, cache_by_chunks = run(model, method, lengths, 64)
    # Matmuls of other shapes may sum in another order; numbers have size 1.
    np.testing.assert_allclose(hidden_by_chunks, hidden, atol=1e-5)

    def same(by_chunks: jax.Array, at_once: jax.Array) -> None:
        assert by_chunks.shape == at_once.shape
        assert by_chunks.dtype == at_once.dtype
        if at_once.dtype == jnp.float32:
            np.testing.assert_allclose(by_chunks, at_once, atol=1e-5)
        elif at_once.dtype == jnp.float16:
            np.testing.assert_allclose(by_chunks.astype(jnp.float32), at_once.astype(jnp.float32), rtol=1e-3, atol=1e-5)
        else:
            np.testing.assert_array_equal(by_chunks, at_once)

    jax.tree.map(same, cache_by_chunks, cache)


def temporary_bytes(layers: int, batch: int, tokens: int, **changes: Any) -> int:
    """Bytes allocated by a compiled prefill under `minikv` besides arguments and cache."""
    sizes = {"head_dim": 64, "hidden_size": 256, "num_key_value_heads": 4, "intermediate_size": 256} | changes
    config = tiny_config(num_hidden_layers=layers, max_position_embeddings=tokens, **sizes)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: mk.Llama(config, rngs=nnx.Rngs(0))))

    def program(params: Any, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
        return prefill(nnx.merge(graphdef, params), ids, lengths, MINIKV32, 64)

    shapes = jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory: Any = jax.jit(program).lower(params, *shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_one_layers_keys_and_values_live_at_a_time():
    one_layer = 2 * 4096 * 256 * 4
    assert temporary_bytes(9, 1, 4096) - temporary_bytes(3, 1, 4096) < one_layer


def test_rows_bound_the_activations(monkeypatch: pytest.MonkeyPatch):
    at_a_time(monkeypatch, 2048)
    assert temporary_bytes(1, 16, 512) < 1.2 * temporary_bytes(1, 4, 512)


def test_chunks_bound_the_mlp(monkeypatch: pytest.MonkeyPatch):
    wide = 2048 * 8192 * 4  # an activation of the MLP
    whole = temporary_bytes(1, 1, 2048, intermediate_size=8192)
    at_a_time(monkeypatch, 256)
    assert temporary_bytes(1, 1, 2048, intermediate_size=8192) < whole - wide


# One layer at a time ------------------------------------------------------------------------------

SINGLE = {
    "full": lookup.get("full"),
    "minikv": MINIKV32,
    "pyramid": dataclasses.replace(lookup.get("minikv-pyramid"), tail=Tail(length=32)),
    "snapkv": dataclasses.replace(lookup.get("snapkv"), heavy=20, recent=12, sinks=3),
    "kivi": Method(quantizer=Hadamard(k_bits=4), tail=Tail(length=16, rule="kivi")),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_layer_is_prefilled_as_in_the_model(name: str):
    """Caches equal those of `prefill` bit for bit, also with a sliding window."""
    windows = {"sliding_window": 40, "layer_types": ("full_attention", "sliding_attention")}
    model = tiny_model(model_type="qwen2", max_position_embeddings=128, **windows)
    ids, lengths, method = random_ids((2, 80)), jnp.array([80, 33]), SINGLE[name]
    layers: list[LayerCache] = []

    def attend(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        inputs = layer_inputs(model, number, q, k, v, lengths)
        out, layer = prefill_layer(inputs, method, 9, num_layers=2)
        layers.append(layer)
        return out

    hidden = model.forward(ids, jnp.broadcast_to(jnp.arange(80), ids.shape), attend)
    expected_hidden, expected = prefill(model, ids, lengths, method, 9)
    np.testing.assert_array_equal(last_valid(hidden, lengths), expected_hidden)
    assert jax.tree.structure(tuple(layers)) == jax.tree.structure(expected.layers)
    jax.tree.map(np.testing.assert_array_equal, tuple(layers), expected.layers)


def test_a_single_layer_cannot_see_all_scores():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="budget=Variance reads the scores of all layers"):
        prefill_layer(mk.LayerInputs(x, x, x, jnp.array([8])), "minikv-variance", 4)


# A method's settings ------------------------------------------------------------------------------

BASE = Method(scorer=SnapKV(), heavy=0.25, recent=0.125, sinks=2, quantizer=MinMax(), tail=Tail(length=32))
H2O_FULL = dataclasses.replace(BASE, scorer=H2O(), quantizer=None)
FIELDS: dict[str, tuple[Method, Any]] = {  # field of a method: (a base, the other value)
    "scorer": (BASE, H2O()),
    "heavy": (BASE, 0.125),
    "recent": (BASE, 0.25),
    "sinks": (BASE, 0),
    "evict_every": (H2O_FULL, 8),
    "budget": (BASE, Pyramid()),
    "quantizer": (BASE, Hadamard()),
    "tail": (BASE, Tail(length=64)),
    "refit": (BASE, Ridge()),
    "retrieval_heads": (BASE, ((1, 0),)),
}
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {  # field: (its component, the component's other values)
    "scorer": (SnapKV(), {"observation_window": 8, "pooling": "mean", "pooling_kernel": 3}),
    "budget": (Pyramid(), {"beta": 20.0}),
    "quantizer": (MinMax(), {"k_bits": 4, "v_bits": 3, "group_size": 32, "metadata_dtype": "bfloat16"}),
    "tail": (Tail(length=32), {"length": 64, "rule": "kivi"}),
}
MORE: dict[str, tuple[str, Component, Component]] = {
    "cap": ("budget", Variance(), Variance(cap=1.0)),
    "lag": ("scorer", LagKV(), LagKV(lag=16)),
    "queries": ("refit", Ridge(), Ridge(queries=8)),
    "strength": ("refit", Ridge(), Ridge(strength=1.0)),
}
CHANGES = {field: (base, dataclasses.replace(base, **{field: value})) for field, (base, value) in FIELDS.items()}
CHANGES |= {
    f"{field}.{name}": (BASE, dataclasses.replace(BASE, **{field: dataclasses.replace(component, **{name: value})}))
    for field, (component, values) in SETTINGS.items()
    for name, value in values.items()
}
CHANGES |= {
    f"{field}.{name}": tuple(dataclasses.replace(BASE, **{field: component}) for component in components)
    for name, (field, *components) in MORE.items()
}


def test_every_setting_has_a_change():
    fields = {field.name for field in dataclasses.fields(Method)}
    # Two are not part of the method's identity, and the third needs a model that decodes (test_lookahead.py).
    assert set(FIELDS) == fields - {"name", "citation", "lookahead"}
    for component, values in SETTINGS.values():
        assert set(values) == set(settings(component))


MODEL = cast(Llama, projections(2, (4, 2)))
PROMPT = jnp.asarray(np.random.default_rng(0).permutation(VOCABULARY)[None, :200])


def kept(ids: jax.Array, method: Method) -> KVCache:
    return prefill(MODEL, ids, jnp.array([200]), method, 64)[1]


@functools.cache
def shapes(method: Method) -> list[jax.ShapeDtypeStruct]:
    """Shapes of all arrays of a method's cache for one prompt."""
    return jax.tree.leaves(jax.eval_shape(functools.partial(kept, method=method), PROMPT))


@functools.cache
def numbers(method: Method) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(kept(PROMPT, method))))


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_is_read(name: str):
    """Changing any setting changes the shapes or the numbers of a prompt's cache."""
    before, after = CHANGES[name]
    if shapes(before) == shapes(after):  # different shapes need no computation
        assert not all(map(np.array_equal, numbers(before), numbers(after)))


def test_variance_budgets_follow_the_spread():
    """Rows and layers keep different numbers of tokens, never more than the capacity."""
    method = dataclasses.replace(lookup.get("minikv-variance"), tail=Tail(length=32))
    model = tiny_model(max_position_embeddings=512)
    tokens = np.asarray(run(model, method, [200, 90], 224)[1].kept_tokens)
    mean = np.array([2 * (200 // 4), 2 * (90 // 4)])
    assert np.all(np.abs(tokens.mean(axis=0) - mean) <= 1)  # counts are rounded down
    assert np.all(tokens >= mean // 2)
