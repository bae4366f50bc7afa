"""Tests the CUDA votes of the last queries against float64, within twice the error of plain JAX in float32."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.attention import relative_error
from support.prompts import REFUSED, Prompts, random_prompts

import cuda_ffi
from minikv_jax.ops.window_votes import window_votes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Prompts):
    """Prompts, and the windows of last queries that vote."""

    sizes: tuple[int, ...]
    power: int = 1


CASES = (
    Case(1, (1,), sizes=(1,)),
    Case(17, (17, 9, 0), sizes=(3, 17)),
    Case(300, (300, 299, 5), sizes=(16, 256), head_dim=64, heads=3, kv_heads=3, dtype="float16"),
    Case(257, (257, 64, 1), sizes=(32,), head_dim=96, heads=8, kv_heads=1),
    Case(321, (321, 130), sizes=(8, 100, 129, 321), head_dim=256, dtype="float16"),
    Case(700, (700, 513), sizes=(16, 256), window=1),
    Case(700, (700, 513), sizes=(40,), window=100, head_dim=64),
    Case(1100, (1025,), sizes=(64, 300), window=700, heads=2, kv_heads=2),
    Case(1100, (1100,), sizes=(16, 256), scale=4.0),  # logits in the hundreds, of both signs
    Case(1100, (1100, 33), sizes=(64,), power=2),
    Case(2048, (2048,), sizes=(16, 256), heads=32, kv_heads=32),
    Case(5000, (5000, 4097), sizes=(600,), heads=8, kv_heads=2),
)


def expected(case: Case, q: np.ndarray, k: np.ndarray, scale: float) -> list[np.ndarray]:
    """The votes of each window of queries in float64, one row and head after the other."""
    out = [np.zeros((len(case.lengths), case.kv_heads, case.tokens)) for _ in case.sizes]
    for row, n in itertools.product(range(len(case.lengths)), range(case.heads)):
        length, head = case.lengths[row], n * case.kv_heads // case.heads
        newest = np.arange(length)[::-1][: case.sizes[-1]]
        distance = newest[:, None] - np.arange(length)
        seen = (distance >= 0) & (distance < (case.window or case.tokens))
        queries, keys = (x[row, :length, i].astype(np.float64) for x, i in ((q, n), (k, head)))
        logits = np.where(seen, queries[newest] @ keys.T * scale, -np.inf)
        weights = np.exp(logits - logits.max(-1, initial=-1e30, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)) ** case.power
        for votes, size in zip(out, case.sizes, strict=True):
            votes[row, head, :length] += weights[:size].sum(0)
    return out


def check(case: Case, seed: int) -> None:
    q, k, lengths = case.arrays(seed, values=False)
    scale = case.logit_scale
    options = {"scale": scale, "power": case.power, "window": case.window}
    run = jax.jit(functools.partial(cuda_ffi.window_votes, sizes=case.sizes, **options))
    got = run(*map(jnp.asarray, (q, k, lengths)))
    plain_jax = functools.partial(window_votes, sizes=case.sizes, power=case.power, window=case.window)
    in_float32 = (q.astype(np.float32) * np.float32(scale * case.head_dim**0.5), k.astype(np.float32), lengths)
    xla = jax.jit(functools.partial(plain_jax, implementation="xla"))(*map(jnp.asarray, in_float32))
    padding = np.arange(case.tokens) >= lengths[:, None, None]
    for size, want, votes, plain in zip(case.sizes, expected(case, q, k, scale), got, xla, strict=True):
        error = relative_error(np.asarray(votes), want)
        # exp2 in hardware is exact to two roundings, which a power multiplies, so the bound is no tighter.
        assert error <= 2 * max(relative_error(np.asarray(plain), want), case.power * 2**-22), (size, error)
        assert not np.asarray(votes)[np.broadcast_to(padding, votes.shape)].any()
    for first, again in zip(got, run(*map(jnp.asarray, (q, k, lengths))), strict=True):
        assert np.asarray(first).tobytes() == np.asarray(again).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_votes_are_the_definition(case: Case) -> None:
    check(case, seed=case.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = random_prompts(rng, 1500)
    sizes = sorted({int(n) for n in rng.integers(1, prompts.tokens + 1, rng.integers(1, 4))})
    check(Case(**vars(prompts), sizes=tuple(sizes), power=int(rng.integers(1, 3))), seed)


@pytest.mark.gpu
def test_one_program_serves_all_lengths() -> None:
    q, k, _ = (jnp.asarray(x) for x in Prompts(128, (128, 128)).arrays(0, values=False))
    traces = []

    @jax.jit
    def run(lengths: jax.Array) -> jax.Array:
        traces.append(0)
        return cuda_ffi.window_votes(q, k, lengths, (16,), scale=1.0)[0]

    votes = [np.asarray(run(jnp.array(lengths, jnp.int32))) for lengths in ((128, 3), (5, 128))]
    assert len(traces) == 1
    assert (votes[0][0] == np.asarray(run(jnp.array((128, 128), jnp.int32)))[0]).all()
    # The group of two query heads adds up to 1 per query.
    np.testing.assert_allclose(votes[0].sum(-1), [[32.0] * 2, [6.0] * 2], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *REFUSED,
        ({"power": 0}, ValueError, "power=0"),
        ({"sizes": (4, 17)}, ValueError, r"sizes=\(4, 17\): expected ascending numbers in 1\.\.16"),
        ({"sizes": (4, 4)}, ValueError, r"sizes=\(4, 4\): expected ascending"),
        ({"sizes": (0, 4)}, ValueError, r"sizes=\(0, 4\): expected ascending"),
        (
            {"sizes": (1, 2, 3, 4, 5)},
            NotImplementedError,
            "number of sizes=5: the CUDA votes kernel supports 1, 2, 3, 4",
        ),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = dataclasses.replace(Case(16, (16,), scale=1.0, sizes=(4, 16)), **change)
    q, k, lengths = map(jnp.asarray, case.arrays(0, values=False))
    options: Any = {"scale": case.scale, "power": case.power, "window": case.window}
    with pytest.raises(error, match=message):
        cuda_ffi.window_votes(q, k, lengths, case.sizes, **options)
