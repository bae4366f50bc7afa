"""Tests saving a cache and continuing from it."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from support.tiny import tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax.methods import lookup

METHODS = {
    "full": lookup.get("full"),
    "minikv": dataclasses.replace(lookup.get("minikv"), tail=mk.Tail(length=32), sinks=2),
    "float8": mk.Method(
        quantizer=mk.MinMax(k_bits=3, v_bits=2, metadata_dtype="float8_e4m3fn"), tail=mk.Tail(length=32, rule="kivi")
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("window", [None, pytest.param(40, marks=pytest.mark.slow)])
def test_round_trip(name: str, window: int | None, tmp_path: pathlib.Path):
    family = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    model = tiny_model(max_position_embeddings=256, **family)
    rows = [list(range(70)), list(range(90, 60, -1))]
    result = mk.generate(model, rows, method=METHODS[name], max_new_tokens=9, eos_token_ids=())
    mk.save_cache(result.cache, tmp_path / "cache")
    restored = mk.restore_cache(tmp_path / "cache", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(result.cache)
    jax.tree.map(np.testing.assert_array_equal, restored, result.cache)
    goes_on = [
        np.asarray(mk.generate(model, [[5], [6]], cache=cache, max_new_tokens=8).tokens)
        for cache in (result.cache, restored)
    ]
    np.testing.assert_array_equal(goes_on[0], goes_on[1])


def test_mismatch_and_absence_are_named(tmp_path: pathlib.Path):
    model = tiny_model()
    mk.save_cache(mk.generate(model, [[1, 2, 3]], max_new_tokens=2).cache, tmp_path / "cache")
    for changes, message in (
        ({"num_hidden_layers": 3}, "layers 2, the model 3"),
        ({"num_key_value_heads": 1}, "KV heads 2, the model 1"),
        ({"head_dim": 32}, "head dim 16, the model 32"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding windows"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.restore_cache(tmp_path / "cache", tiny_config(**changes))
    with pytest.raises(FileExistsError, match="cache exists"):
        mk.save_cache(mk.generate(model, [[1]], max_new_tokens=1).cache, tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="nothing holds no saved cache"):
        mk.restore_cache(tmp_path / "nothing", model.config)
    shutil.rmtree(tmp_path / "cache" / "arrays")
    with pytest.raises(FileNotFoundError, match=r"arrays"):
        mk.restore_cache(tmp_path / "cache", model.config)
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json is not valid JSON"):
        mk.restore_cache(tmp_path / "cache", model.config)


def test_a_cache_that_evicts_goes_on_evicting(tmp_path: pathlib.Path):
    """Scores and budgets are saved with the cache."""
    model = tiny_model(max_position_embeddings=256)
    method = mk.Method(scorer=mk.H2O(), heavy=8, recent=8, sinks=1, evict_every=4)
    result = mk.generate(model, [list(range(60))], method=method, max_new_tokens=6, eos_token_ids=())
    mk.save_cache(result.cache, tmp_path / "cache")
    restored = mk.restore_cache(tmp_path / "cache", model.config)
    jax.tree.map(np.testing.assert_array_equal, restored, result.cache)
    assert restored.layers[0].method == method


def test_a_component_that_is_not_registered_is_named(tmp_path: pathlib.Path):
    """A saved cache holds names of components, so a plugin must be loaded before restoring it."""

    class Newest(mk.H2O):
        shift: float = 0.0

    model = tiny_model()
    method = mk.Method(scorer=Newest(shift=2.0), heavy=2, recent=2)
    cache = mk.generate(model, [[1, 2, 3]], method=method, max_new_tokens=2).cache
    mk.save_cache(cache, tmp_path / "cache")
    with pytest.raises(ValueError, match="scorer='Newest': expected one of"):
        mk.restore_cache(tmp_path / "cache", model.config)
    mk.register_scorer("Newest")(Newest)
    assert mk.restore_cache(tmp_path / "cache", model.config).layers[0].method == method
