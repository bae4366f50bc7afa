"""Tests inspections against plain computations on a tiny model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

from minikv_jax.cache import memory
from minikv_jax.evaluation.inspection import Inspection, attention_share, inspect
from minikv_jax.generate import generate
from minikv_jax.methods import lookup
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.quarot import Hadamard, hadamard
from minikv_jax.methods.registry import register_scorer
from minikv_jax.models.decoder import Llama
from minikv_jax.packing import Packing, dequantize, encode_minmax
from minikv_jax.prefill import attend, layer_inputs

PROMPT = np.random.default_rng(0).integers(0, 96, 100).tolist()  # padded to 112 when it runs
NEW = 6
MINIKV = dataclasses.replace(lookup.get("minikv"), tail=Tail(length=32), sinks=2)
METHODS = {
    "full": lookup.get("full"),
    "minikv": MINIKV,
    "unpacked": dataclasses.replace(MINIKV, tail=Tail(length=64, rule="kivi")),
    "pyramid": dataclasses.replace(
        MINIKV, budget=Pyramid(beta=7.0), quantizer=Hadamard(k_bits=2, v_bits=4, group_size=16)
    ),
}


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def inspections(model: Llama) -> dict[str, Inspection]:
    return inspect(model, PROMPT, METHODS, NEW)


def all_layers(model: Llama, ids: list[int]) -> list[LayerInputs]:
    """Computes q, k, v and column sums of every layer without padding."""

    @jax.jit
    def run(ids: jax.Array, lengths: jax.Array) -> list[LayerInputs]:
        layers: list[LayerInputs] = []

        def attend_layer(number: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out, inputs = attend(layer_inputs(model, number, q, k, v, lengths), MINIKV)
            layers.append(inputs)
            return out

        model.forward(ids, jnp.arange(ids.shape[1])[None], attend_layer)
        return layers

    return run(jnp.asarray([ids]), jnp.array([len(ids)]))


def test_kept_tokens_are_the_methods_choice(model: Llama, inspections: dict[str, Inspection]):
    """Kept tokens are the sinks, the newest, and the best column sums in between, up to the layer's budget."""
    assert inspections["full"].kept.all()
    for name, budgets in (("minikv", (25, 25)), ("pyramid", (46, 3))):  # 25 times 13/7 and 1/7
        sinks, kept = METHODS[name].sinks, inspections[name].kept
        assert kept.shape == (2, 2, 100)
        for inputs, of_layer, heavy in zip(all_layers(model, PROMPT), kept, budgets, strict=True):
            assert inputs.column_sums is not None
            middle = np.asarray(inputs.column_sums)[0, :, sinks:75]
            for head, scores in enumerate(middle):
                expected = np.zeros(100, bool)
                expected[:sinks] = expected[75:] = True
                expected[sinks + np.argsort(-scores)[:heavy]] = True
                np.testing.assert_array_equal(of_layer[head], expected)
    np.testing.assert_array_equal(inspections["pyramid"].kept_tokens, [[73, 73], [30, 30]])


def test_budgets_are_those_of_the_cache(model: Llama, inspections: dict[str, Inspection]):
    for name, method in METHODS.items():
        report = memory.report(model.config, method, prompt_length=112, max_new_tokens=NEW, dtype="float32")
        assert tuple(inspections[name].layer_bytes) == report.layer_bytes
    assert inspections["minikv"].packed_tokens.tolist() == [48, 48]  # 50 after the sinks, in blocks of 16
    assert inspections["full"].packed_tokens.tolist() == [0, 0]


def test_attention_kept_is_the_share_of_the_next_tokens_weights(model: Llama, inspections: dict[str, Inspection]):
    said = generate(model, [PROMPT], method="full", max_new_tokens=NEW).tokens[0].tolist()
    layers = all_layers(model, PROMPT + said)
    np.testing.assert_allclose(inspections["full"].attention_kept, 1, rtol=1e-6)
    for name in ("minikv", "pyramid"):
        for number, inputs in enumerate(layers):
            q, k = np.asarray(inputs.q, np.float64)[0], np.asarray(inputs.k, np.float64)[0]
            for head in range(2):
                kept, total = 0.0, 0.0
                for t in range(100, 100 + NEW):
                    for query in q[t, 2 * head : 2 * head + 2]:
                        weights = np.exp(k[: t + 1, head] @ query / 4)
                        weights /= weights.sum()
                        total += weights[:100].sum()
                        kept += weights[:100][inspections[name].kept[number, head]].sum()
                assert inspections[name].attention_kept[number, head] == pytest.approx(kept / total, rel=1e-5)
                assert kept / total < 0.99


@functools.partial(jax.jit, static_argnums=1)
def read_back(x: jax.Array, packing: Packing) -> jax.Array:
    return dequantize(encode_minmax(x, packing))


def test_errors_are_what_is_read_back_minus_what_was_stored(model: Llama, inspections: dict[str, Inspection]):
    layers = all_layers(model, PROMPT)
    for name in ("minikv", "pyramid"):
        quantizer, result = METHODS[name].quantizer, inspections[name]
        assert quantizer is not None
        rotation = hadamard(16) if name == "pyramid" else np.eye(16, dtype=np.float32)
        for number, inputs in enumerate(layers):
            kept = result.kept[number]
            slots = slice(2, 2 + result.packed_tokens[number])
            positions = np.stack([np.flatnonzero(head)[slots] for head in kept])[..., None]
            operands: list[tuple[Any, Packing, Any, Any]] = [
                (inputs.k, Packing(quantizer.k_bits, 16, "tokens"), result.key_error, result.key_rms),
                (inputs.v, Packing(quantizer.v_bits, 16, "channels"), result.value_error, result.value_rms),
            ]
            for x, packing, error, rms in operands:
                stored = np.take_along_axis(np.asarray(x)[0].swapaxes(0, 1), positions, axis=1)  # [K, P, H]
                gap = np.asarray(read_back(stored @ rotation, packing)) @ rotation.T - stored
                np.testing.assert_allclose(error[number], np.sqrt(np.mean(gap**2, axis=1)), rtol=2e-3)
                np.testing.assert_allclose(rms[number], np.sqrt(np.mean(stored**2, axis=1)), rtol=1e-4)
    assert inspections["full"].key_error is None
    assert inspections["full"].layer_key_error is None
    pyramid = inspections["pyramid"]
    assert pyramid.layer_key_error is not None and pyramid.layer_value_error is not None
    assert pyramid.key_error is not None and pyramid.key_rms is not None
    expected = np.linalg.norm(pyramid.key_error[1]) / np.linalg.norm(pyramid.key_rms[1])
    assert pyramid.layer_key_error[1] == pytest.approx(expected, rel=1e-5)
    assert (pyramid.layer_value_error < pyramid.layer_key_error).all()  # 4 bits against 2


def test_attention_share_of_windows_and_of_no_attention():
    """All keys are equal, so that a query attends to each of them equally."""
    q, k = jnp.zeros((3, 2, 4)), jnp.zeros((10, 1, 4))
    kept = jnp.arange(6)[None] % 2 == 0
    share = jax.jit(attention_share, static_argnums=5)
    assert share(kept, q, k, 6, 3)[0] == pytest.approx(0.5)
    # Window 4: queries at 6, 7, 8 see the prompt's 3-5, 4-5 and 5, of which 4 is kept.
    assert share(kept, q, k, 6, 3, 4)[0] == pytest.approx(2 / 6)
    assert share(kept, q, k, 6, 1, 4)[0] == pytest.approx(1 / 3)
    assert share(kept, q, k, 6, 3, 1)[0] == 1


def test_a_layer_that_packs_nothing_has_no_error(inspections: dict[str, Inspection]):
    unpacked = inspections["unpacked"]
    assert unpacked.packed_tokens.tolist() == [0, 0]
    assert unpacked.key_error is not None and unpacked.layer_key_error is not None
    assert np.isnan(unpacked.key_error).all() and np.isnan(unpacked.layer_key_error).all()


def test_wrong_prompts_and_methods_are_named(model: Llama):
    with pytest.raises(ValueError, match=r"the prompt: 253 prompt \+ 6 new tokens exceed the model's 256 positions"):
        inspect(model, [1] * 253, METHODS, NEW)
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary of 96"):
        inspect(model, [96], METHODS, NEW)
    with pytest.raises(ValueError, match="head_dim 16"):
        inspect(model, PROMPT, {"x": dataclasses.replace(MINIKV, quantizer=MinMax(group_size=32))}, NEW)


def test_a_scorer_of_nan_is_refused():
    @register_scorer("test-nan")
    def nan(inputs: LayerInputs) -> jax.Array:
        return jnp.full_like(inputs.k[..., 0], jnp.nan, jnp.float32).swapaxes(1, 2)

    method = Method(scorer=nan, heavy=4, recent=4)
    with pytest.raises(ValueError, match="method 'mine': its scorer 'test-nan' gives NaN for tokens of the prompt"):
        inspect(tiny_model(), list(range(20)), {"mine": method}, 2)
