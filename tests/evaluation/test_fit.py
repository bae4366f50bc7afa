"""Token budgets fitted to a share of the full cache's bytes."""

import dataclasses

import pytest
from support.tiny import tiny_config

from minikv_jax.cache import memory
from minikv_jax.evaluation import SizedMethod
from minikv_jax.methods import lookup as presets


@pytest.mark.parametrize("name", ["minikv", "minikv-pyramid", "minikv-variance", "h2o", "snapkv", "streaming-llm"])
@pytest.mark.parametrize("share", [0.125, 0.25])
def test_fitted_budget_is_the_largest_within_its_bytes(name: str, share: float):
    model = tiny_config()
    sizes = {"prompt_length": 4096, "max_new_tokens": 64, "dtype": "bfloat16"}
    config = SizedMethod(presets.get(name), share).fit(model, **sizes)
    full = memory.report(model, presets.get("full"), **sizes).bytes
    assert memory.report(model, config, **sizes).bytes <= share * full
    field = "heavy" if config.heavy else "recent"
    step = 1 if isinstance(getattr(config, field), int) else 0.002  # more than one token of any layer's packing block
    more = {field: getattr(config, field) + step * config_block(config)}
    assert memory.report(model, dataclasses.replace(config, **more), **sizes).bytes > share * full
    original = presets.get(name)
    if isinstance(original.heavy, float) and original.heavy:
        assert config.recent == pytest.approx(config.heavy * original.recent / original.heavy, abs=1e-4)
    assert dataclasses.replace(config, heavy=original.heavy, recent=original.recent) == original


def config_block(config):
    return config.packing_block if config.quantized else 1


def test_budget_that_cannot_be_fitted_is_refused():
    sizes = {"prompt_length": 512, "max_new_tokens": 64, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="'kivi-2' keeps every token"):
        SizedMethod(presets.get("kivi-2"), 0.5).fit(tiny_config(), **sizes)
    with pytest.raises(ValueError, match=r"'minikv' does not fit 6.25% of the full cache's bytes.*takes 2\d\.\d"):
        SizedMethod(presets.get("minikv"), 0.0625).fit(tiny_config(), **sizes)
