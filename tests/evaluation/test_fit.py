"""Tests token budgets fitted to a share of the full cache's bytes."""

import dataclasses

import pytest
from support.tiny import tiny_config

from minikv_jax.cache import memory
from minikv_jax.evaluation import SizedMethod
from minikv_jax.methods import lookup
from minikv_jax.methods.method import Method, Share, Tokens


@pytest.mark.parametrize("name", ["minikv", "minikv-pyramid", "minikv-variance", "h2o", "snapkv", "streaming-llm"])
@pytest.mark.parametrize("share", [0.125, 0.25])
def test_fitted_budget_is_the_largest_within_its_bytes(name: str, share: float):
    model = tiny_config()
    sizes = {"prompt_length": 4096, "max_new_tokens": 64, "dtype": "bfloat16"}
    method = SizedMethod(lookup.get(name), share).fit(model, **sizes)
    full = memory.report(model, lookup.get("full"), **sizes).bytes
    assert memory.report(model, method, **sizes).bytes <= share * full
    assert memory.report(model, with_a_block_more(method), **sizes).bytes > share * full
    original = lookup.get(name)
    if original.heavy and isinstance(original.heavy, Share):
        assert isinstance(original.recent, Share) and isinstance(method.heavy, Share)
        assert isinstance(method.recent, Share)
        ratio = original.recent.fraction / original.heavy.fraction
        assert method.recent.fraction == pytest.approx(method.heavy.fraction * ratio, abs=1e-4)
    assert dataclasses.replace(method, heavy=original.heavy, recent=original.recent) == original


def with_a_block_more(method: Method) -> Method:
    """Returns the method with a larger fitted budget, by more than one packing block of any layer."""
    block = 1 if method.quantizer is None else method.quantizer.block
    budget = method.heavy or method.recent
    more = Tokens(budget.count + block) if isinstance(budget, Tokens) else Share(budget.fraction + 0.002 * block)
    return dataclasses.replace(method, heavy=more) if method.heavy else dataclasses.replace(method, recent=more)


def test_budget_that_cannot_be_fitted_is_refused():
    sizes = {"prompt_length": 512, "max_new_tokens": 64, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="'kivi-2' keeps every token"):
        SizedMethod(lookup.get("kivi-2"), 0.5).fit(tiny_config(), **sizes)
    with pytest.raises(ValueError, match=r"'minikv' does not fit 6.25% of the full cache's bytes.*takes 2\d\.\d"):
        SizedMethod(lookup.get("minikv"), 0.0625).fit(tiny_config(), **sizes)
