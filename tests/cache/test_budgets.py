"""Tests the budgets of rows and layers against exact arithmetic."""

import dataclasses
import functools
import itertools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from oracle import naive

from minikv_jax.cache.budgets import budgets_from_scores, layer_budgets
from minikv_jax.methods import lookup
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.method import Amount, Method, Share, Tokens
from minikv_jax.methods.minikv import Variance
from minikv_jax.methods.pyramidkv import Pyramid

LENGTHS = np.array([1, 2, 3, 7, 19, 38, 39, 40])
TOKENS = 40
SCORED = Method(scorer=H2O(), heavy=0.25, recent=0.25)
EXAMPLES = hypothesis.settings(derandomize=True, deadline=None, max_examples=100, database=None)


def scored(**changes: Any) -> Method:
    return dataclasses.replace(SCORED, **changes)


def units(budget: Amount) -> int:
    """Returns a budget in tokens, or in 1/10000 of the prompt."""
    return budget.count if isinstance(budget, Tokens) else budget.units


FRACTIONS = [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5804, 0.9999, 1.0]


@pytest.mark.parametrize("budget", [*map(Share, FRACTIONS), *map(Tokens, (0, 1, 37, 5000))], ids=str)
def test_budgets_resolve_alike_for_numbers_and_arrays(budget: Amount):
    lengths = np.unique(np.concatenate([np.arange(0, 400), 10000 * np.arange(8) + 9999, [2**17, 10**6, 2**31 - 1]]))
    want = [naive.tokens_of(budget, int(length)) for length in lengths]
    np.testing.assert_array_equal(budget.tokens(jnp.asarray(lengths, jnp.int32)), want)
    assert [budget.tokens(int(length)) for length in lengths] == want


METHODS = [
    scored(budget=Pyramid()),
    scored(budget=Pyramid(beta=20.0)),
    scored(budget=Pyramid(beta=1.0)),
    scored(budget=Pyramid(), heavy=0.5, recent=0.25),  # the lowest layers are cut off at 0.75
    scored(budget=Pyramid(), heavy=0.7, recent=0.3),  # no room in any layer, so all get 0.7
    scored(budget=Pyramid(), heavy=0.6, recent=16),
    scored(budget=Pyramid(), heavy=1016, recent=8),
    scored(budget=Pyramid(beta=3.5), heavy=7, recent=0.5),
    scored(heavy=0.1234),
    scored(heavy=99),
]


def check_layers(method: Method, layers: int) -> None:
    got = layer_budgets(method, layers)
    shares = [units(budget) for budget in got]
    assert shares == naive.layer_shares(method, layers)
    assert all(type(budget) is type(method.heavy) for budget in got)
    assert sum(shares) == layers * units(method.heavy)
    assert shares == sorted(shares, reverse=True)
    if isinstance(method.heavy, Share) and isinstance(method.recent, Share):
        assert max(shares) <= 10000 - method.recent.units


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 32])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.heavy}-{method.recent}-{method.budget}")
def test_layers_share_the_budget(method: Method, layers: int):
    check_layers(method, layers)


@EXAMPLES
@hypothesis.given(
    heavy=strategies.integers(1, 10000),
    recent=strategies.integers(0, 10000),
    beta=strategies.integers(1, 40),
    layers=strategies.integers(1, 40),
)
def test_no_layer_gets_over_its_limit_and_nothing_is_lost(heavy: int, recent: int, beta: int, layers: int):
    hypothesis.assume(heavy + recent <= 10000)
    check_layers(scored(heavy=heavy / 10000, recent=recent / 10000, budget=Pyramid(beta=float(beta))), layers)


@EXAMPLES
@hypothesis.given(
    weights=strategies.lists(strategies.integers(0, 9), min_size=1, max_size=12).filter(any),
    heavy=strategies.integers(1, 10000),
)
def test_a_rule_of_ones_own_keeps_the_total(weights: list[int], heavy: int):
    method = scored(heavy=heavy / 10000, recent=0.0, budget=lambda num_layers: [float(weight) for weight in weights])
    shares = [units(budget) for budget in layer_budgets(method, len(weights))]
    assert sum(shares) == heavy * len(weights)
    assert max(shares) <= 10000
    by_weight = [share for _, share in sorted(zip(weights, shares, strict=True), key=lambda pair: pair[0])]
    assert all(after >= before - 1 for before, after in itertools.pairwise(by_weight))


def test_pyramid_of_the_papers():
    """In MiniKV, the last layer gets a seventh of the mean, and the first nearly twice the mean."""
    got = np.array([units(budget) / 10000 for budget in layer_budgets(lookup.get("minikv-pyramid"), 32)])
    assert got[-1] == pytest.approx(0.25 / 7, abs=1e-4)
    assert got[0] == pytest.approx(0.5 - 0.25 / 7, abs=1e-4)
    steps = -np.diff(got)
    assert steps.max() - steps.min() <= 2.01e-4


@pytest.mark.parametrize(
    "method",
    [
        scored(budget=Variance()),
        scored(budget=Variance(cap=1.2), heavy=0.5, recent=0.2),
        scored(budget=Variance(), heavy=6, recent=4),
        scored(budget=Variance(cap=10.0), heavy=0.3, recent=0.1),
    ],
    ids=lambda method: f"{method.heavy}-{method.recent}-{method.budget}",
)
def test_variance_budgets(method: Method):
    """Budgets follow the number of tokens that carry the scores, from flat to spiked layers."""
    rng = np.random.default_rng(3)
    shape = (len(LENGTHS), 2, TOKENS)
    scores = [rng.gamma(sharpness, size=shape).astype(np.float32) for sharpness in (30.0, 3.0, 0.5, 0.05)]
    padding = np.broadcast_to(np.arange(TOKENS) >= LENGTHS[:, None, None], shape)
    for layer in scores:
        layer[padding] = np.nan
    run = jax.jit(functools.partial(budgets_from_scores, method))
    got = np.asarray(run([jnp.asarray(layer) for layer in scores], jnp.asarray(LENGTHS)))
    np.testing.assert_array_equal(got, naive.heavy_tokens(method, scores, LENGTHS.tolist()))
    total = np.array([naive.tokens_of(method.heavy, n) for n in LENGTHS.tolist()]) * len(scores)
    assert (got.sum(axis=0) <= total).all()
    assert (got.sum(axis=0) > total - len(scores)).all()  # all except for rounding down
    long = got[:, LENGTHS > 10]
    assert (np.diff(long, axis=0) <= 0).all()
    assert (long[0] > long[-1]).all()
    # Each row and layer keeps no more than its static capacity.
    for share, row in zip(layer_budgets(method, len(scores)), got, strict=True):
        assert (row <= [naive.tokens_of(share, n) for n in LENGTHS.tolist()]).all()


def test_a_rule_that_gives_nan_grants_nothing_there():
    method = scored(heavy=8, recent=4, budget=Variance())
    scores = [jnp.full((2, 3, TOKENS), value) for value in (1.0, jnp.nan, 1.0)]
    granted = budgets_from_scores(method, scores, jnp.array([TOKENS, TOKENS - 3]))
    np.testing.assert_array_equal(granted, [[12, 12], [0, 0], [12, 12]])
