"""Calibration: what is learnt, how it is saved, and that the method does with it what was learnt."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config, tiny_model

from minikv_jax import generate, restore_cache, save_cache
from minikv_jax.cache import memory
from minikv_jax.cache.state import LayerCache
from minikv_jax.calibrate import Learnt, Settings, calibrate
from minikv_jax.layerwise import compress_layers, prefill_layers
from minikv_jax.methods import calibrated as calibration
from minikv_jax.methods import lookup as presets
from minikv_jax.methods import quantizers
from minikv_jax.methods.base import QUANTIZERS, Kind, Operand
from minikv_jax.methods.config import CacheConfig
from minikv_jax.methods.quantizers import hadamard, packs_by_minmax
from minikv_jax.models.decoder import Llama
from minikv_jax.ops import decode_attention as attention
from minikv_jax.ops import dispatch as kernels
from minikv_jax.packing import QuantizedArray, dequantize

PROMPT, AFTER = 96, 16
RNG = np.random.default_rng(0)
TEXTS = [(RNG.integers(0, 96, PROMPT).tolist(), RNG.integers(0, 96, AFTER).tolist()) for _ in range(2)]
BASE = dataclasses.replace(presets.get("minikv"), name="base", residual_length=32, sinks=2, quantizer="hadamard")
SETTINGS = Settings(("ranges", "rotation"), steps=30)


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def learnt(model: Llama) -> Learnt:
    return calibrate(model, TEXTS, BASE, SETTINGS)


@pytest.fixture
def config(learnt: Learnt, model: Llama, tmp_path: pathlib.Path) -> CacheConfig:
    return calibration.save(learnt.calibration, BASE, model.config, tmp_path / "learnt")


def test_every_layers_loss_falls_and_a_seed_repeats_it(model: Llama, learnt: Learnt):
    assert (learnt.after < 0.8 * learnt.before).all()
    assert learnt.curve[-10:].mean() < 0.8 * learnt.curve[:2].mean()
    again = calibrate(model, TEXTS, BASE, SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, learnt, again)
    for part in learnt.calibration:
        assert np.abs(part.rotation @ part.rotation.swapaxes(1, 2) - np.eye(16)).max() < 1e-5
        assert np.abs(part.rotation - hadamard(16)).max() > 0.01
        assert np.abs(np.log(part.ranges.low)).max() > 0.01


def test_what_is_not_to_be_learnt_stays_as_it_is(model: Llama, learnt: Learnt):
    only = calibrate(model, TEXTS, BASE, dataclasses.replace(SETTINGS, learn=("ranges",)))
    np.testing.assert_array_equal(only.before, learnt.before)
    assert (only.after < only.before).all()
    for part in only.calibration:
        np.testing.assert_array_equal(part.rotation, np.broadcast_to(hadamard(16), (2, 16, 16)))
        assert np.abs(np.log(part.ranges.high)).max() > 0.01


def test_a_rotation_alone_is_packed_by_every_kernel(model: Llama, learnt: Learnt, tmp_path: pathlib.Path):
    ones = jax.tree.map(np.ones_like, [part.ranges for part in learnt.calibration])
    parts = [part._replace(ranges=ranges) for part, ranges in zip(learnt.calibration, ones, strict=True)]
    config = calibration.save(calibration.Calibration(*parts), BASE, model.config, tmp_path / "rotation")
    assert config.quantizer == "calibrated-rotation"
    assert packs_by_minmax(config)
    memory.check_model(model.config, config)
    rotation = QUANTIZERS["calibrated-rotation"].rotation(Operand("values", 1, config), 16)
    np.testing.assert_array_equal(rotation, np.asarray(learnt.calibration.values.rotation)[1])


@jax.jit
def attend(later: list[Any], layers: tuple[LayerCache, ...]) -> list[jax.Array]:
    """Attention of every layer's later tokens over its cache and one another."""
    lengths = jnp.array([AFTER])
    return [attention.extend_attention(q, k, v, layer, lengths) for (q, k, v), layer in zip(later, layers, strict=True)]


def relative_error(model: Llama, config: CacheConfig) -> np.ndarray:
    """Each layer's squared error of attention over a real cache, against the same tokens in full precision; mean."""
    exact = dataclasses.replace(config, k_bits=None, v_bits=None, quantizer="minmax", options=())
    found = []
    for prompt, after in TEXTS:
        lengths, ids = np.array([PROMPT]), np.array([prompt + after])
        _, layers = prefill_layers(model, ids[:, :PROMPT], lengths, True, None)
        _, whole = prefill_layers(model, ids, lengths + AFTER, True, None)
        caches = [
            compress_layers(
                model.config, c, layers, lengths, memory.capacities(model.config, c, PROMPT, AFTER), None
            ).cache
            for c in (config, exact)
        ]
        later = [tuple(x[:, PROMPT:] for x in layer[:3]) for layer in whole]
        pairs = [attend(later, cache.layers) for cache in caches]
        found.append([np.sum((out - want) ** 2) / np.sum(want**2) for out, want in zip(*pairs, strict=True)])
    return np.mean(found, axis=0)


def test_the_loss_is_the_error_of_the_methods_own_attention(model: Llama, learnt: Learnt, config: CacheConfig):
    np.testing.assert_allclose(learnt.before, relative_error(model, BASE), rtol=1e-3)
    np.testing.assert_allclose(learnt.after, relative_error(model, config), rtol=1e-3)


def test_saved_and_loaded_agree_bit_for_bit(learnt: Learnt, config: CacheConfig, tmp_path: pathlib.Path):
    calibration._load.cache_clear()
    loaded = calibration.load(tmp_path / "learnt")
    assert jax.tree.structure(loaded) == jax.tree.structure(learnt.calibration)
    jax.tree.map(np.testing.assert_array_equal, loaded, learnt.calibration)
    assert presets.get(str(tmp_path / "learnt")) == config
    changed = {"name", "citation", "quantizer", "options"}
    for field in dataclasses.fields(BASE):
        assert field.name in changed or getattr(config, field.name) == getattr(BASE, field.name)
    with pytest.raises(FileExistsError, match="learnt exists"):
        calibration.save(learnt.calibration, BASE, tiny_config(), tmp_path / "learnt")
    with pytest.raises(FileNotFoundError, match="holds no calibration"):
        calibration.load(tmp_path)


def test_groups_use_the_learnt_part_of_their_range(learnt: Learnt, config: CacheConfig):
    """Codes, scales and zeros of the plain layout, from ranges about the middle of each group."""
    x = np.random.default_rng(1).normal(size=(2, 2, 32, 16)).astype(np.float32)
    kinds: tuple[tuple[Kind, calibration.OperandCalibration], ...]
    kinds = (("keys", learnt.calibration.keys), ("values", learnt.calibration.values))
    for kind, part in kinds:
        packed = QUANTIZERS["calibrated"].quantize(jnp.asarray(x), Operand(kind, 1, config))
        assert isinstance(packed, QuantizedArray)
        groups = x.reshape(2, 2, 2, 16, 16) if kind == "keys" else x.reshape(2, 2, 32, 1, 16)
        axis = 3 if kind == "keys" else 4
        low, high = groups.min(axis), groups.max(axis)
        middle, half = (low + high) / 2, (high - low) / 2
        below, above = (np.asarray(r)[1][None, :, None] for r in part.ranges)  # of layer 1
        np.testing.assert_allclose(packed.zero, middle - below * half, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(packed.scale, (below + above) * half / 3, rtol=2e-3)
        read = np.asarray(dequantize(packed)).reshape(groups.shape)
        np.testing.assert_allclose(read.max(axis), middle + above * half, rtol=0.01, atol=0.01)
    rotation = QUANTIZERS["calibrated"].rotation(Operand("keys", 1, config), 16)
    np.testing.assert_array_equal(rotation, np.asarray(learnt.calibration.keys.rotation)[1])


def test_any_implementation_reads_it_and_xla_packs_it(model: Llama, config: CacheConfig, tmp_path: pathlib.Path):
    result = generate(model, [TEXTS[0][0]], cache=config, max_new_tokens=4, eos_token_ids=())
    report = memory.report(model.config, config, prompt_length=PROMPT, max_new_tokens=4, dtype="float32")
    assert result.cache.nbytes == report.bytes
    plain = memory.report(model.config, BASE, prompt_length=PROMPT, max_new_tokens=4, dtype="float32")
    assert report.bytes == plain.bytes
    assert int(result.cache.layers[0].packed_length[0]) > 0
    k, _ = kernels._packed(result.cache.layers[0])  # what the decode kernels are given
    assert k is result.cache.layers[0].k
    assert not packs_by_minmax(config)
    with pytest.raises(NotImplementedError, match="quantizer='calibrated' has no 'cuda' kernel"):
        quantizers.quantize(jnp.zeros((1, 2, 32, 16)), Operand("keys", 0, config), "cuda")
    save_cache(result.cache, tmp_path / "cache")
    restored = restore_cache(tmp_path / "cache", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(result.cache)


def test_another_model_or_layout_is_refused(config: CacheConfig):
    path = str(config.option("calibration"))
    wrong = tiny_config(head_dim=32, num_hidden_layers=3)
    with pytest.raises(ValueError, match="learnt for num_hidden_layers=2, here 3; head_dim=16, here 32"):
        memory.check_model(wrong, config)
    with pytest.raises(ValueError, match=f"the calibration {path} was learnt for k_bits=2, here 4"):
        memory.check_model(tiny_config(), dataclasses.replace(config, k_bits=4))
    memory.check_model(tiny_config(), dataclasses.replace(config, heavy=0.1))  # which tokens stay is free
    with pytest.raises(ValueError, match="needs calibration=DIR"):
        memory.check_model(tiny_config(), CacheConfig(quantizer="calibrated", k_bits=2, v_bits=2))
    with pytest.raises(FileNotFoundError, match="/no/such holds no calibration"):
        memory.check_model(tiny_config(), dataclasses.replace(config, options={"calibration": "/no/such"}))


def test_what_cannot_be_calibrated_is_named(model: Llama):
    with pytest.raises(ValueError, match="method 'full' has nothing quantised: expected quantizer='minmax' or"):
        calibrate(model, TEXTS, presets.get("full"))
    with pytest.raises(ValueError, match="method 'nvfp4' has quantizer='nvfp4'"):
        calibrate(model, TEXTS, presets.get("nvfp4"))
    with pytest.raises(ValueError, match="the same lengths"):
        calibrate(model, [*TEXTS, ([1], [2])], BASE)
    with pytest.raises(ValueError, match="'base' packs nothing of a prompt of 4 tokens"):
        calibrate(model, [([1, 2, 3, 4], [5])], BASE)
    wrong: dict[str, Any]
    for wrong in ({"learn": ("budgets",)}, {"learn": ()}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
            Settings(**wrong)
