"""Tests calibration: learning, saving, and using what was learned."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config, tiny_model

from minikv_jax import generate, restore_cache, save_cache
from minikv_jax.cache import memory
from minikv_jax.cache.capacity import capacities
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache
from minikv_jax.calibrate import Learnt, Settings, calibrate
from minikv_jax.layerwise import compress_layers, prefill_layers
from minikv_jax.methods import calibrated, contracts, lookup
from minikv_jax.methods.base import Kind, Operand
from minikv_jax.methods.calibrated import Calibrated, CalibratedRotation
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.quarot import Hadamard, hadamard
from minikv_jax.models.attention import Attention
from minikv_jax.models.decoder import Llama
from minikv_jax.ops.extend_attention import extend_attention
from minikv_jax.ops.quantize import store
from minikv_jax.packing import QuantizedArray, dequantize

PROMPT, AFTER = 96, 16
RNG = np.random.default_rng(0)
TEXTS = [(RNG.integers(0, 96, PROMPT).tolist(), RNG.integers(0, 96, AFTER).tolist()) for _ in range(2)]
BASE = dataclasses.replace(
    lookup.get("minikv"), name="base", tail=Tail(length=32), sinks=2, quantizer=Hadamard(k_bits=2, v_bits=2)
)
SETTINGS = Settings(("ranges", "rotation"), steps=30)


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def learnt(model: Llama) -> Learnt:
    return calibrate(model, TEXTS, BASE, SETTINGS)


@pytest.fixture
def method(learnt: Learnt, model: Llama, tmp_path: pathlib.Path) -> Method:
    return calibrated.save(learnt.calibration, BASE, model.config, tmp_path / "learnt")


def test_the_loss_of_every_layer_falls_and_a_seed_repeats_it(model: Llama, learnt: Learnt):
    assert (learnt.after < 0.8 * learnt.before).all()
    assert learnt.curve[-10:].mean() < 0.8 * learnt.curve[:2].mean()
    again = calibrate(model, TEXTS, BASE, SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, learnt, again)
    for part in learnt.calibration:
        assert np.abs(part.rotation @ part.rotation.swapaxes(1, 2) - np.eye(16)).max() < 1e-5
        assert np.abs(part.rotation - hadamard(16)).max() > 0.01
        assert np.abs(np.log(part.ranges.low)).max() > 0.01


def test_what_is_not_to_be_learned_stays_as_it_is(model: Llama, learnt: Learnt):
    only = calibrate(model, TEXTS, BASE, dataclasses.replace(SETTINGS, learn=("ranges",)))
    np.testing.assert_array_equal(only.before, learnt.before)
    assert (only.after < only.before).all()
    for part in only.calibration:
        np.testing.assert_array_equal(part.rotation, np.broadcast_to(hadamard(16), (2, 16, 16)))
        assert np.abs(np.log(part.ranges.high)).max() > 0.01


def test_rotations_may_start_from_the_closed_form(model: Llama, learnt: Learnt):
    closed = calibrate(model, TEXTS, BASE, Settings(start="oscar", steps=0))
    np.testing.assert_array_equal(closed.before, learnt.before)
    assert closed.curve.shape == (0,)
    for part in closed.calibration:
        np.testing.assert_allclose(part.rotation @ part.rotation.swapaxes(1, 2), [np.eye(16)] * 2, atol=1e-5)
        assert np.abs(part.rotation - hadamard(16)).max() > 0.01
        assert all((leaf == 1).all() for leaf in part.ranges)
    further = calibrate(model, TEXTS, BASE, Settings(start="oscar", steps=30))
    # Not in every layer, because rounding is no smooth function.
    assert further.after.mean() < 0.95 * closed.after.mean()


def test_every_kernel_packs_what_is_only_rotated(model: Llama, learnt: Learnt, tmp_path: pathlib.Path):
    ones = jax.tree.map(np.ones_like, [part.ranges for part in learnt.calibration])
    parts = [part._replace(ranges=ranges) for part, ranges in zip(learnt.calibration, ones, strict=True)]
    method = calibrated.save(calibrated.Calibration(*parts), BASE, model.config, tmp_path / "rotation")
    assert type(method.quantizer) is CalibratedRotation
    assert method.quantizer.kernel_packs
    contracts.check(method, model.config)
    rotation = method.quantizer.rotation(Operand("values", 1), 16)
    np.testing.assert_array_equal(rotation, np.asarray(learnt.calibration.values.rotation)[1])


@jax.jit
def attend(later: list[Any], layers: tuple[LayerCache, ...]) -> list[jax.Array]:
    """Computes each layer's attention of later tokens over its cache and one another."""
    lengths = jnp.array([AFTER])
    return [extend_attention(q, k, v, layer, lengths) for (q, k, v), layer in zip(later, layers, strict=True)]


def relative_error(model: Llama, method: Method) -> np.ndarray:
    """Mean over layers of the squared attention error over a real cache, relative to full precision."""
    exact = dataclasses.replace(method, quantizer=None)
    errors = []
    for prompt, after in TEXTS:
        lengths, ids = np.array([PROMPT]), np.array([prompt + after])
        _, layers = prefill_layers(model, ids[:, :PROMPT], lengths, True, None)
        _, whole = prefill_layers(model, ids, lengths + AFTER, True, None)
        caches = [
            compress_layers(
                model.config, each, layers, lengths, lengths, capacities(model.config, each, PROMPT, AFTER), None
            ).cache
            for each in (method, exact)
        ]
        later = [tuple(x[:, PROMPT:] for x in layer[:3]) for layer in whole]
        pairs = [attend(later, cache.layers) for cache in caches]
        errors.append([np.sum((out - want) ** 2) / np.sum(want**2) for out, want in zip(*pairs, strict=True)])
    return np.mean(errors, axis=0)


def test_the_loss_is_the_error_of_the_methods_own_attention(model: Llama, learnt: Learnt, method: Method):
    np.testing.assert_allclose(learnt.before, relative_error(model, BASE), rtol=1e-3)
    np.testing.assert_allclose(learnt.after, relative_error(model, method), rtol=1e-3)


def test_saved_and_loaded_agree_bit_for_bit(learnt: Learnt, method: Method, tmp_path: pathlib.Path):
    shutil.copytree(tmp_path / "learnt", tmp_path / "copy")  # which has not been read yet
    loaded = calibrated.load(tmp_path / "copy")
    assert jax.tree.structure(loaded) == jax.tree.structure(learnt.calibration)
    jax.tree.map(np.testing.assert_array_equal, loaded, learnt.calibration)
    assert lookup.get(str(tmp_path / "learnt")) == method
    assert (method.name, method.citation) == ("learnt", f"base, calibrated: {BASE.citation}")
    assert dataclasses.replace(method, quantizer=BASE.quantizer) == BASE
    with pytest.raises(FileExistsError, match="learnt exists"):
        calibrated.save(learnt.calibration, BASE, tiny_config(), tmp_path / "learnt")
    with pytest.raises(FileNotFoundError, match="holds no saved calibration"):
        calibrated.load(tmp_path)


def test_groups_use_the_learned_part_of_their_range(learnt: Learnt, method: Method):
    """Codes, scales and zeros have the plain layout, with ranges around each group's midpoint."""
    x = np.random.default_rng(1).normal(size=(2, 2, 32, 16)).astype(np.float32)
    kinds: tuple[tuple[Kind, calibrated.OperandCalibration], ...]
    kinds = (("keys", learnt.calibration.keys), ("values", learnt.calibration.values))
    for kind, part in kinds:
        assert isinstance(method.quantizer, Calibrated)
        packed = method.quantizer.encode(jnp.asarray(x), Operand(kind, 1))
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
    assert method.quantizer is not None
    rotation = method.quantizer.rotation(Operand("keys", 1), 16)
    np.testing.assert_array_equal(rotation, np.asarray(learnt.calibration.keys.rotation)[1])


def test_any_implementation_reads_it_and_xla_packs_it(model: Llama, method: Method, tmp_path: pathlib.Path):
    result = generate(model, [TEXTS[0][0]], method=method, max_new_tokens=4, eos_token_ids=())
    report = memory.report(model.config, method, prompt_length=PROMPT, max_new_tokens=4, dtype="float32")
    assert result.cache.nbytes == report.bytes
    plain = memory.report(model.config, BASE, prompt_length=PROMPT, max_new_tokens=4, dtype="float32")
    assert report.bytes == plain.bytes
    assert int(result.cache.parts[0].packed.length[0]) > 0
    assert method.quantizer is not None
    assert method.quantizer.kernel_reads
    assert isinstance(result.cache.parts[0].packed.k, QuantizedArray)
    assert not method.quantizer.kernel_packs
    with pytest.raises(NotImplementedError, match="Calibrated has no 'cuda' kernel"):
        store(jnp.zeros((1, 2, 32, 16)), "keys", LayerSpec(method), "cuda")
    save_cache(result.cache, tmp_path / "cache")
    restored = restore_cache(tmp_path / "cache", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(result.cache)


def test_another_model_or_layout_is_refused(method: Method):
    quantizer = method.quantizer
    assert isinstance(quantizer, Calibrated)
    wrong = tiny_config(head_dim=32, num_hidden_layers=3)
    with pytest.raises(ValueError, match="learned for num_hidden_layers=2, here 3; head_dim=16, here 32"):
        contracts.check(method, wrong)
    with pytest.raises(ValueError, match=f"the calibration {quantizer.calibration} was learned for k_bits=2, here 4"):
        contracts.check(lookup.override(method, {"k_bits": "4"}), tiny_config())
    contracts.check(dataclasses.replace(method, heavy=0.1), tiny_config())  # the kept tokens may differ
    with pytest.raises(ValueError, match="calibration='': expected a directory that `minikv calibrate` wrote"):
        contracts.check(Method(quantizer=Calibrated()), tiny_config())
    with pytest.raises(FileNotFoundError, match="/no/such holds no saved calibration"):
        contracts.check(Method(quantizer=Calibrated(calibration="/no/such")), tiny_config())


def test_what_is_not_finite_is_not_saved():
    broken = tiny_model(max_position_embeddings=256)
    attention = broken.layers[1].self_attn
    assert isinstance(attention, Attention)
    kernel = attention.qkv_proj.kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"what is learnt of layer 1 is not finite: expected a rate below 0\.02"):
        calibrate(broken, TEXTS, BASE, Settings(steps=1))


def test_what_cannot_be_calibrated_is_named(model: Llama):
    with pytest.raises(ValueError, match="method 'full' has quantizer=None: expected MinMax or Hadamard"):
        calibrate(model, TEXTS, lookup.get("full"))
    with pytest.raises(ValueError, match=r"method 'nvfp4' has quantizer=NVFP4.*: expected MinMax or Hadamard"):
        calibrate(model, TEXTS, lookup.get("nvfp4"))
    with pytest.raises(ValueError, match="the same lengths"):
        calibrate(model, [*TEXTS, ([1], [2])], BASE)
    with pytest.raises(ValueError, match="'base' packs nothing of a prompt of 4 tokens"):
        calibrate(model, [([1, 2, 3, 4], [5])], BASE)
    wrong: dict[str, Any]
    for wrong in ({"learn": ("budgets",)}, {"learn": ()}, {"start": "here"}, {"steps": -1}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
            Settings(**wrong)
