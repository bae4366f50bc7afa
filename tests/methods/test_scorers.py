"""Tests scorers against their papers' formulas, on ragged rows with NaN in the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive, naive_methods
from support.tiny import tiny_config

from minikv_jax.methods import critical_kv
from minikv_jax.methods.attention_matching import RmsVotes
from minikv_jax.methods.base import LayerInputs, NoScores, Scorer
from minikv_jax.methods.critical_kv import CriticalKV
from minikv_jax.methods.expected_attention import ExpectedAttention
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.keydiff import KeyDiff
from minikv_jax.methods.knorm import KNorm
from minikv_jax.methods.kvzip import KVzip
from minikv_jax.methods.lagkv import LagKV
from minikv_jax.methods.method import Method
from minikv_jax.methods.rest_kv import ReSTKV
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.tova import TOVA
from minikv_jax.methods.twin import Twin
from minikv_jax.models.rotary import inverse_frequencies
from minikv_jax.prefill import prefill_layer, score

LENGTHS, T, H, SINKS = [40, 33, 13, 3], 40, 16, 2
FREQUENCIES = np.asarray(inverse_frequencies(tiny_config(head_dim=H).rope(0)))


@functools.partial(jax.jit, static_argnames=("scorer", "window", "sinks"))
def scores_of(
    scorer: Scorer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    window: int | None = None,
    sinks: int = 0,
) -> jax.Array:
    inputs = LayerInputs(q, k, v, lengths, None, window, 0, jnp.asarray(FREQUENCIES))
    return score(inputs, Method(scorer=scorer, heavy=4, recent=4, sinks=sinks))


def prompt(lengths: list[int], heads: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes random q, k and v of `T` tokens, with NaN after each row's length."""
    rng = np.random.default_rng(seed)
    padding = np.arange(T) >= np.array(lengths)[:, None]
    q, k, v = (rng.normal(size=(len(lengths), T, count, H)).astype(np.float32) for count in (*heads, heads[1]))
    for x in (q, k, v):
        x[padding] = np.nan
    return q, k, v


SCORERS = [
    *(TOVA(), KNorm(), KeyDiff(), LagKV(lag=8), ExpectedAttention(future=6, epsilon=0.01)),
    *(ReSTKV(), ReSTKV(observation_window=7, smoothing=0.3)),
    ReSTKV(observation_window=9, pooling="max", pooling_kernel=5),
]


@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
def test_scores_match_the_formula(scorer: Scorer, heads: tuple[int, int]):
    q, k, v = prompt(LENGTHS, heads)
    method = Method(scorer=scorer, heavy=4, recent=4, sinks=SINKS)
    got = np.asarray(scores_of(scorer, q, k, v, np.array(LENGTHS), sinks=SINKS))
    assert got.shape == (len(LENGTHS), heads[1], T)
    want = naive_methods.prompt_scores(method, q, k, v, LENGTHS, FREQUENCIES)
    first = SINKS if isinstance(scorer, ExpectedAttention) else 0  # sinks are kept whatever their scores
    for b, n in enumerate(LENGTHS):
        # Exponents up to ~10 carry 16 roundings of float32, of which some 1e-5 remains in the weights.
        np.testing.assert_allclose(got[b, :, first:n], want[b, :, first:n], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(
    ("observation_window", "pooling_kernel", "heads", "window"),
    [(4, 7, (6, 2), None), (64, 3, (4, 4), None), (1, 1, (3, 1), None), (8, 5, (4, 2), 6), (37, 5, (4, 2), None)],
)
def test_votes_match_naive(
    pooling: str, observation_window: int, pooling_kernel: int, heads: tuple[int, int], window: int | None
):
    lengths = [1, 2, 3, 7, 19, 38, 39, 40]
    q, k, v = prompt(lengths, heads, seed=2)
    scorer = SnapKV(observation_window=observation_window, pooling=pooling, pooling_kernel=pooling_kernel)
    got = np.asarray(scores_of(scorer, q, k, v, np.array(lengths), window))
    want = naive.window_scores(
        q,
        k,
        lengths,
        observation_window=observation_window,
        pooling=pooling,
        pooling_kernel=pooling_kernel,
        window=window,
    )
    # Logits of size ~4 carry 16 roundings of float32 (2**-24), weights below 1; up to 64 queries x 3 heads are summed.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert all(not got[b, :, n:].any() for b, n in enumerate(lengths))


@pytest.mark.parametrize(("queries", "window"), [(1, None), (5, None), (64, None), (9, 6)])
def test_rms_votes_match_the_formula(queries: int, window: int | None):
    lengths = [1, 3, 19, 40]
    q, k, v = prompt(lengths, (4, 2), seed=3)
    got = np.asarray(scores_of(RmsVotes(observation_window=queries), q, k, v, np.array(lengths), window))
    for row, length in enumerate(lengths):
        for head in range(2):
            squares = []
            for query in range(max(length - queries, 0), length):
                first = 0 if window is None else max(query - window + 1, 0)
                for one in q[row, query, 2 * head : 2 * head + 2].astype(np.float64):
                    weights = np.exp(k[row, first : query + 1, head] @ one / np.sqrt(H))
                    squares.append(np.zeros(T))
                    squares[-1][first : query + 1] = (weights / weights.sum()) ** 2
            np.testing.assert_allclose(got[row, head], np.sqrt(np.mean(squares, axis=0)), rtol=1e-5, atol=1e-6)


def test_rest_kv_of_a_token_with_all_the_weight_is_finite():
    q, k = jnp.full((1, 4, 1, H), 50.0), jnp.zeros((1, 4, 1, H)).at[:, 1].set(50.0)
    v = jnp.arange(4 * H, dtype=jnp.float32).reshape(1, 4, 1, H)
    scores = np.asarray(ReSTKV().score(LayerInputs(q, k, v, jnp.array([4]))))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("window", [None, 15])
def test_kvzip_matches_the_formula(window: int | None):
    """Every row is a prompt and its repetition, whose queries vote by their largest weight."""
    lengths = [2, 6, 38, 40]
    q, k, v = prompt(lengths, (4, 2), seed=4)
    got = np.asarray(scores_of(KVzip(), q, k, v, np.array(lengths), window))
    for row, length in enumerate(lengths):
        for head in range(2):
            want = np.zeros(T)
            for query in range(length // 2, length):
                first = 0 if window is None else max(query - window + 1, 0)
                for one in q[row, query, 2 * head : 2 * head + 2].astype(np.float64):
                    weights = np.exp(k[row, first : query + 1, head] @ one / np.sqrt(H))
                    want[first : query + 1] = np.maximum(want[first : query + 1], weights / weights.sum())
            np.testing.assert_allclose(got[row, head], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [H, H - 4])
def test_criticalkv_weighs_votes_by_projected_values(channels: int, monkeypatch: pytest.MonkeyPatch):
    """The norms are means over a group's heads. Values may be padded, as in latent attention, and come in chunks."""
    lengths = [1, 7, 40]
    q, k, v = prompt(lengths, (6, 2), seed=7)
    projection = np.random.default_rng(8).normal(size=(6 * channels, 10)).astype(np.float32)
    scorer = CriticalKV(observation_window=5, pooling="mean", pooling_kernel=3, epsilon=0.01)
    scores = scores_of(scorer, q, k, v, np.array(lengths))
    votes = naive.window_scores(q, k, lengths, observation_window=5, pooling="mean", pooling_kernel=3)
    inputs = LayerInputs(q, k, v, np.array(lengths), output_projection=projection)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(critical_kv, "_PROJECTED", 7 * 3 * 6 * 10)  # seven tokens at a time
    got = np.asarray(scorer.rescore(inputs, scores))
    for row, n in enumerate(lengths):
        for head, token in np.ndindex(2, n):
            weight = votes[row, head, token] / (3 * min(n, 5))
            np.testing.assert_allclose(scores[row, head, token], weight, rtol=1e-5, atol=1e-6)
            norms = []
            for one in range(3 * head, 3 * head + 3):
                own = projection[one * channels : (one + 1) * channels].astype(np.float64)
                norms.append(np.abs(v[row, token, head, :channels] @ own).sum())
            np.testing.assert_allclose(got[row, head, token], (weight + 0.01) * np.mean(norms), rtol=1e-4, atol=1e-5)


def test_criticalkv_needs_the_output_projection():
    x, method = jnp.zeros((1, 8, 2, H)), Method(scorer=CriticalKV(), heavy=2, recent=2)
    with pytest.raises(ValueError, match=r"scorer=CriticalKV needs the layer's LayerInputs\.output_projection"):
        prefill_layer(LayerInputs(x, x, x, jnp.array([8])), method, 1)
    inputs = LayerInputs(x, x, x, jnp.array([8]), output_projection=jnp.zeros((2 * H, 5)))
    assert prefill_layer(inputs, method, 1)[1].tail.length.tolist() == [4]


def test_without_scores_all_tokens_are_alike():
    x, lengths = jnp.full((2, 5, 3, 4), jnp.nan), jnp.array([5, 2])
    np.testing.assert_array_equal(NoScores().score(LayerInputs(x, x, x, lengths)), np.zeros((2, 3, 5)))


def test_h2o_takes_the_column_sums_as_they_are():
    x, sums = jnp.zeros((2, 5, 3, 4)), jnp.ones((2, 3, 5))
    np.testing.assert_array_equal(H2O().score(LayerInputs(x, x, x, jnp.array([5, 2]), sums)), sums)


def test_expected_attention_counts_attention_sinks():
    """A sink that takes all attention of a head leaves the scores to the other head."""
    rng = np.random.default_rng(5)
    q, k = (jnp.asarray(rng.standard_normal((2, 12, heads, 8), np.float32)) for heads in (2, 1))
    inputs = LayerInputs(q, k, k, jnp.array([12, 9]), None, None, 0, jnp.asarray([1.0, 0.3, 0.1, 0.03]))
    score = jax.jit(lambda inputs: ExpectedAttention(future=6).score(inputs))
    case = inputs._replace(window=None, layer=jnp.int32(0))
    taken, untouched = jnp.array([1e9, -1e9]), jnp.array([-1e9, -1e9])
    one, two = score(case._replace(sink_logits=taken)), score(case._replace(sink_logits=untouched))
    np.testing.assert_allclose(two, score(case), rtol=1e-6)
    swapped = score(case._replace(sink_logits=taken[::-1]))
    np.testing.assert_allclose(one + swapped, two, rtol=1e-5, atol=1e-7)


def test_expected_attention_needs_the_rotation():
    x, lengths = jnp.zeros((1, 8, 2, H)), jnp.array([8])
    with pytest.raises(ValueError, match="rotary frequencies"):
        ExpectedAttention().score(LayerInputs(x, x, x, lengths))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(observation_window=0), "observation_window=0: expected an integer in 1..65536"),
        (lambda: SnapKV(pooling="median"), "pooling='median': expected one of max, mean"),
        (lambda: SnapKV(pooling_kernel=4), "pooling_kernel=4: expected an odd number"),
        (lambda: Twin(long_window=0), "long_window=0: expected an integer"),
        (lambda: Twin(observation_window=1.5), "observation_window=1.5: expected an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: CriticalKV(first_stage=-0.5), "first_stage=-0.5: expected a finite number"),
        (lambda: ReSTKV(smoothing=1.5), "smoothing=1.5: expected a finite number"),
        (lambda: ReSTKV(pooling_kernel=2), "pooling_kernel=2: expected an odd number"),
        (lambda: LagKV(lag=0), "lag=0: expected an integer"),
        (lambda: ExpectedAttention(future=0), "future=0: expected an integer"),
        (lambda: ExpectedAttention(epsilon="0.1"), "epsilon='0.1': expected a finite number"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_wrong_setting_is_refused_by_its_scorer(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
