"""Tests CUDA prefill attention against float64, within twice XLA's error at the same dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.attention import causal_attention, relative_error
from support.prompts import REFUSED, Prompts, random_prompts

import cuda_ffi
from cuda_ffi.prefill_attention import column_sums, row_log_sum_exp

CASES = (
    Prompts(1, (1,)),
    Prompts(17, (17, 9)),
    Prompts(257, (257, 64, 0)),
    Prompts(300, (300, 299), head_dim=64, heads=3, kv_heads=3, dtype="float16"),
    Prompts(300, (260,), head_dim=96, heads=8, kv_heads=1),
    Prompts(321, (321, 130), head_dim=256, dtype="float16"),
    Prompts(700, (700, 513), window=1),
    Prompts(700, (700, 513), window=100, head_dim=64),
    Prompts(1100, (1025,), window=700, heads=2, kv_heads=2),
    Prompts(1100, (1100,), scale=4.0),  # logits in the hundreds, of both signs
    Prompts(2048, (2048,), heads=8, kv_heads=2),
)


def check(case: Prompts, seed: int) -> None:
    q, k, v, lengths = case.arrays(seed)
    scale = case.logit_scale
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
def test_attention_and_scores_are_the_definition(case: Prompts) -> None:
    check(case, seed=case.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    check(random_prompts(np.random.default_rng(seed), 800), seed)


@pytest.mark.gpu
def test_one_program_serves_all_lengths_and_scores_are_optional() -> None:
    q, k, v, _ = (jnp.asarray(x) for x in Prompts(128, (128, 128)).arrays(0))
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


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_unsupported_cases_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = dataclasses.replace(Prompts(16, (16,), scale=1.0), **change)
    q, k, v, lengths = map(jnp.asarray, case.arrays(0))
    options: Any = {"scale": case.scale, "window": case.window}
    with pytest.raises(error, match=message):
        cuda_ffi.prefill_attention(q, k, v, lengths, **options)
    with pytest.raises(error, match=message):
        row_log_sum_exp(q, k, lengths, **options)


def test_column_sums_want_the_log_sum_exp_of_their_shape() -> None:
    q = jnp.zeros((1, 16, 4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="row_log_sum_exp"):
        column_sums(q, q, jnp.array([16], jnp.int32), jnp.zeros((1, 4, 8), jnp.float32), scale=1.0)
