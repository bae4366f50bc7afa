"""Tests CUDA prefill attention against float64, within twice XLA's error at the same dtype."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.attention import causal_attention, relative_error
from oracle.layout import DTYPES

import cuda_ffi
from cuda_ffi.prefill_attention import column_sums, row_log_sum_exp


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    scale: float | None = None
    window: int | None = None


CASES = (
    Case(1, (1,)),
    Case(17, (17, 9)),
    Case(257, (257, 64, 0)),
    Case(300, (300, 299), head_dim=64, heads=3, kv_heads=3, dtype="float16"),
    Case(300, (260,), head_dim=96, heads=8, kv_heads=1),
    Case(321, (321, 130), head_dim=256, dtype="float16"),
    Case(700, (700, 513), window=1),
    Case(700, (700, 513), window=100, head_dim=64),
    Case(1100, (1025,), window=700, heads=2, kv_heads=2),
    Case(1100, (1100,), scale=4.0),  # logits in the hundreds, of both signs
    Case(2048, (2048,), heads=8, kv_heads=2),
)


def inputs(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Makes q, k, v and lengths, with NaN in the padding."""
    rng = np.random.default_rng(seed)
    lead = (len(case.lengths), case.tokens)
    arrays = [rng.normal(size=(*lead, n, case.head_dim)) for n in (case.heads, case.kv_heads, case.kv_heads)]
    arrays[1][:, :, :, 0] += 3 * rng.normal(size=(*lead, 1))  # some keys are heavy hitters
    for row, length in enumerate(case.lengths):
        for x in arrays:
            x[row, length:] = np.nan
    q, k, v = (x.astype(DTYPES[case.dtype]) for x in arrays)
    return q, k, v, np.array(case.lengths, np.int32)


def check(case: Case, seed: int) -> None:
    q, k, v, lengths = inputs(case, seed)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    want = causal_attention(q, k, v, lengths, scale, case.window)
    in_dtype = causal_attention(q, k, v, lengths, scale, case.window, np.float32)
    arguments = tuple(map(jnp.asarray, (q, k, v, lengths)))
    options = {"scale": scale, "window": case.window, "with_scores": True}
    out, scores = cuda_ffi.prefill_attention(*arguments, **options)
    assert scores is not None
    assert out.dtype == q.dtype
    for i, (name, got) in enumerate((("out", out), ("scores", scores))):
        error, xla = relative_error(np.asarray(got), want[i]), relative_error(in_dtype[i], want[i])
        # exp2 in hardware is exact to two roundings, so the bound on scores is no tighter.
        assert error <= 2 * max(xla, 2**-22 if name == "scores" else 0.0), (name, error, xla)
    padding = np.arange(case.tokens) >= lengths[:, None]
    assert not np.asarray(out)[padding].any()
    assert not np.asarray(scores).swapaxes(1, 2)[padding].any()

    lse = row_log_sum_exp(arguments[0], arguments[1], arguments[3], scale=scale, window=case.window)
    valid = np.broadcast_to(~padding[:, None], lse.shape)
    np.testing.assert_allclose(np.asarray(lse)[valid], want[2][valid], rtol=1e-6, atol=2e-6)
    assert np.isposinf(np.asarray(lse)[~valid]).all()
    again = cuda_ffi.prefill_attention(*arguments, **options)[1]
    assert np.asarray(again).tobytes() == np.asarray(scores).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_scores_are_the_definition(case: Case) -> None:
    check(case, seed=case.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, kv_heads = int(rng.integers(1, 800)), int(rng.integers(1, 4))
    check(
        Case(
            tokens,
            tuple(int(n) for n in rng.integers(0, tokens + 1, rng.integers(1, 4))),
            heads=kv_heads * int(rng.integers(1, 5)),
            kv_heads=kv_heads,
            head_dim=int(rng.choice([64, 96, 128])),
            dtype=str(rng.choice(["bfloat16", "float16"])),
            window=None if rng.random() < 0.6 else int(rng.integers(1, tokens + 1)),
        ),
        seed,
    )


@pytest.mark.gpu
def test_one_program_serves_all_lengths_and_scores_are_optional() -> None:
    q, k, v, _ = (jnp.asarray(x) for x in inputs(Case(128, (128, 128)), 0))
    traces = []

    @jax.jit
    def run(lengths: jax.Array) -> jax.Array:
        traces.append(0)
        out, scores = cuda_ffi.prefill_attention(q, k, v, lengths, scale=1.0)
        assert scores is None
        return out

    outs = [np.asarray(run(jnp.array(lengths, jnp.int32))) for lengths in ((128, 3), (5, 128))]
    assert len(traces) == 1
    assert (outs[0][0, :5] == outs[1][0, :5]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": jnp.float32}, NotImplementedError, "float32"),
        ({"head_dim": 80}, NotImplementedError, "head_dim=80"),
        ({"heads": 3}, ValueError, "3 query heads over 2"),
        ({"window": 0}, ValueError, "window=0"),
        ({"scale": -1.0}, ValueError, "scale=-1"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    options = {"dtype": jnp.bfloat16, "head_dim": 128, "heads": 4, "window": None, "scale": 1.0} | change
    q = jnp.zeros((1, 16, options["heads"], options["head_dim"]), options["dtype"])
    k = jnp.zeros((1, 16, 2, options["head_dim"]), options["dtype"])
    lengths = jnp.array([16], jnp.int32)
    with pytest.raises(error, match=message):
        cuda_ffi.prefill_attention(q, k, k, lengths, scale=options["scale"], window=options["window"])
    with pytest.raises(error, match=message):
        row_log_sum_exp(q, k, lengths, scale=options["scale"], window=options["window"])


def test_column_sums_want_the_log_sum_exp_of_their_shape() -> None:
    q = jnp.zeros((1, 16, 4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="row_log_sum_exp"):
        column_sums(q, q, jnp.array([16], jnp.int32), jnp.zeros((1, 4, 8), jnp.float32), scale=1.0)
