"""Inspections, held against plain computations on a tiny model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minikv_jax.methods.config import CacheConfig
from minikv_jax.methods.quantizers import hadamard
from support.tiny import tiny_model

from minikv_jax import inference
from minikv_jax.cache import memory
from minikv_jax.evaluation.inspection import Inspection, attention_share, inspect
from minikv_jax.generate import generate
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.base import ScorerInputs, register_scorer
from minikv_jax.models.decoder import Llama
from minikv_jax.packing import Axis, dequantize, quantize

PROMPT = np.random.default_rng(0).integers(0, 96, 100).tolist()  # padded to 112 when it runs
NEW = 6
MINIKV = dataclasses.replace(presets.get("minikv"), residual_length=32, sinks=2)
METHODS = {
    "full": presets.get("full"),
    "minikv": MINIKV,
    "unpacked": dataclasses.replace(MINIKV, residual="kivi", residual_length=64),
    "pyramid": dataclasses.replace(MINIKV, budget="pyramid", quantizer="hadamard", v_bits=4),
}


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def found(model: Llama) -> dict[str, Inspection]:
    return inspect(model, PROMPT, METHODS, NEW)


def layer_inputs(model: Llama, ids: list[int]) -> list[ScorerInputs]:
    """q, k and v of every layer, as a run of exactly these tokens has them."""

    @jax.jit
    def run(ids: jax.Array, lengths: jax.Array) -> list[ScorerInputs]:
        layers: list[ScorerInputs] = []
        inference.run_prompt(model, ids, lengths, layers.append, True)
        return [inputs._replace(layer=0) for inputs in layers]

    return run(jnp.asarray([ids]), jnp.array([len(ids)]))


def test_kept_tokens_are_the_methods_choice(model: Llama, found: dict[str, Inspection]):
    """Sinks, the newest, and the best column sums between them, as many as the layer's budget."""
    assert found["full"].kept.all()
    for name, budgets in (("minikv", (25, 25)), ("pyramid", (46, 3))):  # 25 times 13/7 and 1/7
        config, kept = METHODS[name], found[name].kept
        assert kept.shape == (2, 2, 100)
        for inputs, of_layer, heavy in zip(layer_inputs(model, PROMPT), kept, budgets, strict=True):
            assert inputs.column_sums is not None
            middle = np.asarray(inputs.column_sums)[0, :, config.sinks : 75]
            for head, scores in enumerate(middle):
                want = np.zeros(100, bool)
                want[: config.sinks] = want[75:] = True
                want[config.sinks + np.argsort(-scores)[:heavy]] = True
                np.testing.assert_array_equal(of_layer[head], want)
    np.testing.assert_array_equal(found["pyramid"].kept_tokens, [[73, 73], [30, 30]])


def test_budgets_are_those_of_the_cache(model: Llama, found: dict[str, Inspection]):
    for name, config in METHODS.items():
        report = memory.report(model.config, config, prompt_length=112, max_new_tokens=NEW, dtype="float32")
        assert tuple(found[name].layer_bytes) == report.layer_bytes
    assert found["minikv"].packed_tokens.tolist() == [48, 48]  # 50 after the sinks, in blocks of 16
    assert found["full"].packed_tokens.tolist() == [0, 0]


def test_attention_kept_is_the_share_of_the_next_tokens_weights(model: Llama, found: dict[str, Inspection]):
    said = generate(model, [PROMPT], cache="full", max_new_tokens=NEW).tokens[0].tolist()
    layers = layer_inputs(model, PROMPT + said)
    np.testing.assert_allclose(found["full"].attention_kept, 1, rtol=1e-6)
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
                        kept += weights[:100][found[name].kept[number, head]].sum()
                assert found[name].attention_kept[number, head] == pytest.approx(kept / total, rel=1e-5)
                assert kept / total < 0.99


@functools.partial(jax.jit, static_argnums=(1, 2))
def read_back(x: jax.Array, bits: int, axis: Axis) -> jax.Array:
    return dequantize(quantize(x, bits=bits, group_size=16, axis=axis))


def test_errors_are_what_is_read_back_minus_what_was_stored(model: Llama, found: dict[str, Inspection]):
    layers = layer_inputs(model, PROMPT)
    for name in ("minikv", "pyramid"):
        config, result = METHODS[name], found[name]
        rotation = hadamard(16) if name == "pyramid" else np.eye(16, dtype=np.float32)
        for number, inputs in enumerate(layers):
            kept = result.kept[number]
            slots = slice(2, 2 + result.packed_tokens[number])
            positions = np.stack([np.flatnonzero(head)[slots] for head in kept])[..., None]
            operands: list[tuple[Any, int | None, Axis, Any, Any]] = [
                (inputs.k, config.k_bits, "tokens", result.key_error, result.key_rms),
                (inputs.v, config.v_bits, "channels", result.value_error, result.value_rms),
            ]
            for x, bits, axis, error, rms in operands:
                assert bits is not None
                stored = np.take_along_axis(np.asarray(x)[0].swapaxes(0, 1), positions, axis=1)  # [K, P, H]
                gap = np.asarray(read_back(stored @ rotation, bits, axis)) @ rotation.T - stored
                np.testing.assert_allclose(error[number], np.sqrt(np.mean(gap**2, axis=1)), rtol=2e-3)
                np.testing.assert_allclose(rms[number], np.sqrt(np.mean(stored**2, axis=1)), rtol=1e-4)
    assert found["full"].key_error is None
    assert found["full"].layer_key_error is None
    pyramid = found["pyramid"]
    assert pyramid.layer_key_error is not None and pyramid.layer_value_error is not None
    assert pyramid.key_error is not None and pyramid.key_rms is not None
    want = np.linalg.norm(pyramid.key_error[1]) / np.linalg.norm(pyramid.key_rms[1])
    assert pyramid.layer_key_error[1] == pytest.approx(want, rel=1e-5)
    assert (pyramid.layer_value_error < pyramid.layer_key_error).all()  # 4 bits against 2


def test_attention_share_of_windows_and_of_no_attention():
    """Keys that all look alike, so that a query pays each the same."""
    q, k = jnp.zeros((3, 2, 4)), jnp.zeros((10, 1, 4))
    kept = jnp.arange(6)[None] % 2 == 0
    share = jax.jit(attention_share, static_argnums=5)
    assert share(kept, q, k, 6, 3)[0] == pytest.approx(0.5)
    # Window 4: queries at 6, 7, 8 see the prompt's 3-5, 4-5 and 5, of which 4 is kept.
    assert share(kept, q, k, 6, 3, 4)[0] == pytest.approx(2 / 6)
    assert share(kept, q, k, 6, 1, 4)[0] == pytest.approx(1 / 3)
    assert share(kept, q, k, 6, 3, 1)[0] == 1


def test_a_layer_that_packs_nothing_has_no_error(found: dict[str, Inspection]):
    unpacked = found["unpacked"]
    assert unpacked.packed_tokens.tolist() == [0, 0]
    assert unpacked.key_error is not None and unpacked.layer_key_error is not None
    assert np.isnan(unpacked.key_error).all() and np.isnan(unpacked.layer_key_error).all()


def test_wrong_prompts_and_methods_are_named(model: Llama):
    with pytest.raises(ValueError, match=r"the prompt: 253 prompt \+ 6 new tokens exceed the model's 256 positions"):
        inspect(model, [1] * 253, METHODS, NEW)
    with pytest.raises(ValueError, match="token id 96 is outside the vocabulary of 96"):
        inspect(model, [96], METHODS, NEW)
    with pytest.raises(ValueError, match="head_dim 16"):
        inspect(model, PROMPT, {"x": dataclasses.replace(MINIKV, group_size=32)}, NEW)


def test_a_scorer_of_nan_is_refused():
    @register_scorer("test-nan")
    def nan(inputs: ScorerInputs, config: CacheConfig) -> jax.Array:
        return jnp.full_like(inputs.k[..., 0], jnp.nan, jnp.float32).swapaxes(1, 2)

    config = CacheConfig(scorer="test-nan", heavy=4, recent=4)
    with pytest.raises(ValueError, match="method 'mine': its scorer 'test-nan' gives NaN for tokens of the prompt"):
        inspect(tiny_model(), list(range(20)), {"mine": config}, 2)
