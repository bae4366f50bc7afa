"""Scorers, budgets and the choice of tokens against the naive reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive

from minikv_jax.methods import lookup as presets
from minikv_jax.methods.base import SCORERS, ScorerInputs
from minikv_jax.methods.config import CacheConfig
from minikv_jax.ops.select import budget_tokens, budgets_from_scores, kept_capacity, layer_budgets, select_tokens

LENGTHS = np.array([1, 2, 3, 7, 19, 38, 39, 40])
TOKENS = 40


def scored(**changes: object) -> CacheConfig:
    return dataclasses.replace(CacheConfig(scorer="cumulative", heavy=0.25, recent=0.25), **changes)


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5804, 0.9999, 1.0, 0, 1, 37, 5000])
def test_budgets_resolve_alike_for_numbers_and_arrays(budget: float | int):
    lengths = np.unique(np.concatenate([np.arange(0, 400), 10000 * np.arange(8) + 9999, [2**17, 10**6, 2**31 - 1]]))
    want = [naive.tokens_of(budget, int(length)) for length in lengths]
    np.testing.assert_array_equal(budget_tokens(budget, jnp.asarray(lengths, jnp.int32)), want)
    assert [budget_tokens(budget, int(length)) for length in lengths] == want


@pytest.mark.parametrize(
    "config",
    [
        scored(),
        scored(heavy=0.33, recent=0.0, sinks=3),
        scored(heavy=0.5, recent=0.5, sinks=2),
        scored(heavy=5, recent=7, sinks=4),
        scored(heavy=0.1, recent=1),
        scored(heavy=100, recent=3),
        CacheConfig(recent=10, sinks=4),
        CacheConfig(recent=0.0, sinks=1),
        CacheConfig(),
    ],
    ids=lambda config: f"heavy{config.heavy}-recent{config.recent}-sinks{config.sinks}",
)
def test_select_tokens_matches_naive(config: CacheConfig):
    """Ragged rows, and so few different scores that ties decide most choices."""
    shape = (len(LENGTHS), 3, TOKENS)
    scores = np.random.default_rng(0).integers(0, 4, shape).astype(np.float32)
    capacity = kept_capacity(config, config.heavy, TOKENS)

    @jax.jit
    def run(scores: jax.Array, lengths: jax.Array):
        return select_tokens(scores, lengths, budget_tokens(config.heavy, lengths), config, capacity)

    kept = run(jnp.asarray(scores), jnp.asarray(LENGTHS))
    assert kept.positions.shape[-1] == capacity <= TOKENS
    for b, length in enumerate(LENGTHS.tolist()):
        for head in range(shape[1]):
            want = naive.kept_positions(
                scores[b, head],
                length,
                sinks=config.sinks,
                heavy=naive.tokens_of(config.heavy, length),
                recent=naive.tokens_of(config.recent, length),
            )
            assert kept.tokens[b] == len(want)
            filler = [TOKENS] * (capacity - len(want))
            np.testing.assert_array_equal(kept.positions[b, head], want + filler)
    # What lies in the padding, and a longer padding, change nothing.
    poisoned = np.where(np.arange(TOKENS) < LENGTHS[:, None, None], scores, np.nan)
    np.testing.assert_array_equal(run(jnp.asarray(poisoned), jnp.asarray(LENGTHS)).positions, kept.positions)


def test_scores_that_are_not_finite_displace_nothing():
    """Sinks and newest tokens stay whatever a scorer gives; NaN is the lowest score, as minus infinity is."""
    scores = np.zeros((1, 4, TOKENS), np.float32)
    scores[0, 0] = np.nan
    scores[0, 1] = np.inf
    scores[0, 2] = -np.inf
    scores[0, 3, ::2] = np.nan
    config, length = scored(heavy=3, recent=4, sinks=2), jnp.array([TOKENS - 5])
    kept = select_tokens(jnp.asarray(scores), length, jnp.array([3]), config, kept_capacity(config, 3, TOKENS))
    newest = list(range(TOKENS - 9, TOKENS - 5))
    assert kept.positions[0, :3].tolist() == [[0, 1, 2, 3, 4, *newest]] * 3
    assert kept.positions[0, 3].tolist() == [0, 1, 3, 5, 7, *newest]
    # In a window too: what the next token does not see is not taken for the lowest of scores.
    first = TOKENS - 5 - 19
    kept = select_tokens(jnp.asarray(scores), length, jnp.array([3]), config, 7, window=20)
    assert kept.positions[0, 2].tolist() == [first, first + 1, first + 2, *newest]


def test_a_rule_that_gives_nan_grants_nothing_there():
    config = scored(heavy=8, recent=4, budget="variance")
    scores = [jnp.full((2, 3, TOKENS), value) for value in (1.0, jnp.nan, 1.0)]
    granted = budgets_from_scores(scores, jnp.array([TOKENS, TOKENS - 3]), config)
    np.testing.assert_array_equal(granted, [[12, 12], [0, 0], [12, 12]])


def test_select_tokens_in_a_sliding_window():
    """Of a prompt whose next token sees `window` tokens, itself included, only the last `window - 1` are kept."""
    window, config = 10, scored(heavy=3, recent=4, sinks=2)
    scores = np.random.default_rng(1).integers(0, 4, (len(LENGTHS), 2, TOKENS)).astype(np.float32)
    capacity = kept_capacity(config, config.heavy, TOKENS, window)
    lengths = jnp.asarray(LENGTHS)
    kept = select_tokens(jnp.asarray(scores), lengths, jnp.full_like(lengths, 3), config, capacity, window)
    assert capacity == window - 1
    for b, length in enumerate(LENGTHS.tolist()):
        first = max(length - window + 1, 0)
        for head in range(2):
            sinks = max(config.sinks - first, 0)
            want = naive.kept_positions(scores[b, head, first:], length - first, sinks=sinks, heavy=3, recent=4)
            got = np.asarray(kept.positions[b, head])
            assert [first + position for position in want] == got[: kept.tokens[b]].tolist()


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(
    ("observation_window", "pooling_kernel", "heads", "window"),
    [(4, 7, (6, 2), None), (64, 3, (4, 4), None), (1, 1, (3, 1), None), (8, 5, (4, 2), 6), (37, 5, (4, 2), None)],
)
def test_window_scores_match_naive(
    pooling: str, observation_window: int, pooling_kernel: int, heads: tuple[int, int], window: int | None
):
    (N, K), H = heads, 16
    rng = np.random.default_rng(2)
    padding = np.arange(TOKENS) >= LENGTHS[:, None]
    q, k = (rng.normal(size=(len(LENGTHS), TOKENS, count, H)).astype(np.float32) for count in (N, K))
    q[padding], k[padding] = np.nan, np.nan
    config = CacheConfig(
        scorer="window",
        heavy=4,
        recent=4,
        observation_window=observation_window,
        pooling=pooling,
        pooling_kernel=pooling_kernel,
    )
    score = jax.jit(lambda q, k, lengths: SCORERS["window"].score(ScorerInputs(q, k, k, lengths, None, window), config))
    got = score(q, k, LENGTHS)
    want = naive.window_scores(
        q,
        k,
        LENGTHS.tolist(),
        observation_window=observation_window,
        pooling=pooling,
        pooling_kernel=pooling_kernel,
        window=window,
    )
    # Logits of size ~4 carry 16 roundings of float32 (2**-24), weights below 1; up to 64 queries x 3 heads are summed.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not np.asarray(got)[np.broadcast_to(padding[:, None], got.shape)].any()


def test_scores_without_a_scorer_are_zero():
    k = jnp.full((2, 5, 3, 4), jnp.nan)
    lengths = jnp.array([5, 2])
    for name, sums in (("none", None), ("cumulative", jnp.ones((2, 3, 5)))):
        got = SCORERS[name].score(ScorerInputs(k, k, k, lengths, sums, None), CacheConfig())
        np.testing.assert_array_equal(got, np.zeros((2, 3, 5)) if sums is None else sums)


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 32])
@pytest.mark.parametrize(
    "config",
    [
        scored(budget="pyramid"),
        scored(budget="pyramid", pyramid_beta=20.0),
        scored(budget="pyramid", pyramid_beta=1.0),
        scored(budget="pyramid", heavy=0.5, recent=0.25),  # the lowest layers are cut off at 0.75
        scored(budget="pyramid", heavy=0.7, recent=0.3),  # no room anywhere: all at 0.7
        scored(budget="pyramid", heavy=0.6, recent=16),
        scored(budget="pyramid", heavy=1016, recent=8),
        scored(budget="pyramid", heavy=7, recent=0.5, pyramid_beta=3.5),
        scored(heavy=0.1234),
        scored(heavy=99),
    ],
    ids=lambda config: f"{config.budget}-{config.heavy}-{config.recent}-{config.pyramid_beta}",
)
def test_layer_budgets(config: CacheConfig, layers: int):
    got = layer_budgets(config, layers)
    unit = 1 if isinstance(config.heavy, int) else 10000
    units = [round(budget * unit) for budget in got]
    assert units == naive.layer_shares(config, layers)
    assert all(type(budget) is type(config.heavy) for budget in got)
    assert sum(units) == layers * round(config.heavy * unit)
    assert units == sorted(units, reverse=True)
    if isinstance(config.heavy, float) and isinstance(config.recent, float):
        assert max(units) <= 10000 - round(config.recent * 10000)


def test_pyramid_of_the_papers():
    """MiniKV: the last layer gets a seventh of the mean, the first nearly twice the mean."""
    got = layer_budgets(presets.get("minikv-pyramid"), 32)
    assert got[-1] == pytest.approx(0.25 / 7, abs=1e-4)
    assert got[0] == pytest.approx(0.5 - 0.25 / 7, abs=1e-4)
    steps = -np.diff(got)
    assert steps.max() - steps.min() <= 2.01e-4


@pytest.mark.parametrize(
    "config",
    [
        scored(budget="variance"),
        scored(budget="variance", heavy=0.5, recent=0.2, variance_cap=1.2),
        scored(budget="variance", heavy=6, recent=4),
        scored(budget="variance", heavy=0.3, recent=0.1, variance_cap=10.0),
    ],
    ids=lambda config: f"{config.heavy}-{config.recent}-{config.variance_cap}",
)
def test_variance_budgets(config: CacheConfig):
    """Layers from flat to spiked: what they get follows how many tokens carry the scores."""
    rng = np.random.default_rng(3)
    shape = (len(LENGTHS), 2, TOKENS)
    scores = [rng.gamma(sharpness, size=shape).astype(np.float32) for sharpness in (30.0, 3.0, 0.5, 0.05)]
    padding = np.broadcast_to(np.arange(TOKENS) >= LENGTHS[:, None, None], shape)
    for layer in scores:
        layer[padding] = np.nan
    run = jax.jit(functools.partial(budgets_from_scores, config=config))
    got = np.asarray(run([jnp.asarray(layer) for layer in scores], jnp.asarray(LENGTHS)))
    np.testing.assert_array_equal(got, naive.heavy_tokens(config, scores, LENGTHS.tolist()))
    total = np.array([naive.tokens_of(config.heavy, n) for n in LENGTHS.tolist()]) * len(scores)
    assert (got.sum(axis=0) <= total).all()
    assert (got.sum(axis=0) > total - len(scores)).all()  # all but what rounding down takes
    long = got[:, LENGTHS > 10]
    assert (np.diff(long, axis=0) <= 0).all()
    assert (long[0] > long[-1]).all()
    # Each row and layer keeps no more than its static capacity.
    for share, row in zip(layer_budgets(config, len(scores)), got, strict=True):
        assert (row <= [naive.tokens_of(share, n) for n in LENGTHS.tolist()]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": "random"}, "scorer='random'"),
        ({"heavy": 1.5}, "heavy=1.5"),
        ({"heavy": -0.1}, "heavy=-0.1"),
        ({"heavy": -3}, "heavy=-3"),
        ({"heavy": float("nan")}, "heavy=nan"),
        ({"heavy": True}, "heavy=True"),
        ({"heavy": "0.5"}, "heavy='0.5'"),
        ({"recent": 2.0}, "recent=2.0"),
        ({"heavy": 0.6, "recent": 0.5}, "heavy=0.6 .* recent=0.5"),
        ({"scorer": "none"}, "heavy=0.25"),
        ({"sinks": -1}, "sinks=-1"),
        ({"sinks": 1.5}, "sinks=1.5"),
        ({"budget": "triangle"}, "budget='triangle'"),
        ({"pyramid_beta": 0.5}, "pyramid_beta=0.5"),
        ({"variance_cap": float("nan")}, "variance_cap=nan"),
        ({"observation_window": 0}, "observation_window=0"),
        ({"pooling": "median"}, "pooling='median'"),
        ({"pooling_kernel": 4}, "pooling_kernel=4"),
        ({"k_bits": 2}, "k_bits=2, v_bits=None"),
        ({"k_bits": 5, "v_bits": 2}, "k_bits=5"),
        ({"k_bits": 2, "v_bits": 6}, "v_bits=6"),
        ({"group_size": 48}, "group_size=48"),
        ({"metadata_dtype": "float32"}, "metadata_dtype='float32'"),
        ({"residual": "none"}, "residual='none'"),
        ({"residual_length": 0}, "residual_length=0"),
        ({"k_bits": 2, "v_bits": 2, "residual_length": 100}, "residual_length=100"),
        ({"k_bits": 2, "v_bits": 1, "residual_length": 48}, "residual_length=48"),  # 1 bit: 32 tokens to a word
    ],
)
def test_wrong_config_is_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        scored(**change)
