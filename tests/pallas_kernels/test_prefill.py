"""Tests Pallas prefill: against dense float64 softmax maps on the GPU; lowering and refusals anywhere."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.attention import causal_attention, relative_error

import pallas_kernels
from minikv_jax.ops.prefill_attention import prefill_attention
from pallas_kernels import column_sums, flash_attention, hopper, tuning
from pallas_kernels.prefill_attention import Config

# Relative to XLA's error in the same dtype: both round weights and results to 16 bits, in different orders. If every
# softmax is over one key, XLA's float32 scores are exact, and the kernel's may be off by one rounding.
FACTOR = 2
ROUNDING = float(np.finfo(np.float32).eps) / 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a compiled program, with a length per row.

    With `multiprocessors` = 0, a thread block of the second pass processes all heads of a group, or else one head.
    """

    lengths: tuple[int, ...]
    tokens: int
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"
    window: int | None = None
    scale: float | None = None
    config: Config | None = None
    multiprocessors: int = hopper.MULTIPROCESSORS

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


CASES = {
    "edges of tiles": Case((0, 1, 63, 64, 65, 127, 128, 129), 129),
    "edges of later tiles": Case((255, 256, 257, 319, 320, 321, 383, 384), 384, kv_heads=1, group=8, multiprocessors=0),
    "tokens between tiles, head_dim 64": Case((300, 299, 193), 300, kv_heads=3, group=1, head_dim=64, dtype="float16"),
    "groups of three, head_dim 64": Case((1, 200, 128, 100), 200, group=3, head_dim=64),
    "one token": Case((1,), 1, kv_heads=1, group=3),
    "float16": Case((260, 140), 260, dtype="float16", scale=0.3),
    "tiles of 64 keys": Case((700, 513), 700, config=Config(flash_attention.Config(block_kv=64, stages=3))),
    "rings go round": Case((2048,), 2048, kv_heads=1, group=4, multiprocessors=0),
    "rings go round, head_dim 64": Case((1025, 1300), 1300, kv_heads=1, group=6, head_dim=64, multiprocessors=0),
    "two warpgroups": Case(
        (900, 513), 900, multiprocessors=0, config=Config(sums=column_sums.Config(warpgroups=2, block_q=64, stages=2))
    ),
    "sections of heads": Case((129, 64, 200), 200, kv_heads=7, group=2),
    "a window of one": Case((260, 200), 260, group=1, window=1),
    "a window within a tile": Case(
        (520, 400, 130, 7), 520, kv_heads=1, group=8, dtype="float16", window=100, multiprocessors=0
    ),
    "a window of two tiles, head_dim 64": Case((700, 513, 129), 700, group=3, head_dim=64, window=256),
    "a window past the end": Case((150, 128), 150, window=1000),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_prefill_matches_dense_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding of q, k and v is NaN, that of the output zero, and two runs are bit-equal."""
    case = CASES[name]
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", case.multiprocessors)
    rng = np.random.default_rng(len(name))
    batch, dtype = len(case.lengths), jnp.dtype(case.dtype)
    lengths = jnp.asarray(case.lengths, jnp.int32)
    q, k, v = (
        jnp.asarray(rng.normal(size=(batch, case.tokens, heads, case.head_dim)), dtype)
        for heads in (case.kv_heads * case.group, case.kv_heads, case.kv_heads)
    )
    options = {"scale": case.logit_scale, "window": case.window, "with_scores": True}
    exact = causal_attention(*map(np.asarray, (q, k, v, lengths)), scale=case.logit_scale, window=case.window)[:2]
    xla = jax.jit(functools.partial(prefill_attention, **options, implementation="xla"))(q, k, v, lengths)

    padding = np.arange(case.tokens) >= np.array(case.lengths)[:, None]
    poisoned = tuple(jnp.where(padding[..., None, None], jnp.nan, x).astype(dtype) for x in (q, k, v))
    run = jax.jit(functools.partial(pallas_kernels.prefill_attention, **options, config=case.config))
    out, scores = run(*poisoned, lengths)

    assert (out.dtype, scores.dtype) == (dtype, jnp.float32)
    for what, got, by_xla, want in zip(("out", "scores"), (out, scores), xla, exact, strict=True):
        error, of_xla = (relative_error(np.asarray(x), want) for x in (got, by_xla))
        bound = max(FACTOR * of_xla, ROUNDING)
        assert error <= bound, f"{what}: relative error {error}, bound {bound}"
    assert not np.asarray(out, np.float32)[padding].any()
    assert not np.asarray(scores).swapaxes(1, 2)[padding].any()
    for first, second in zip((out, scores), run(*poisoned, lengths), strict=True):
        assert np.array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32)), "second run differs"


@pytest.mark.gpu
def test_output_does_not_depend_on_scores() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 200, n, 64), jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    run = jax.jit(pallas_kernels.prefill_attention, static_argnames=("scale", "with_scores"))
    out, nothing = run(q, k, v, jnp.array([190]), scale=0.1, with_scores=False)
    assert nothing is None
    with_scores, _ = run(q, k, v, jnp.array([190]), scale=0.1, with_scores=True)
    assert np.array_equal(np.asarray(out, np.float32), np.asarray(with_scores, np.float32))


# Anywhere -----------------------------------------------------------------------------------------


def abstract(dtype: Any = jnp.bfloat16, head_dim: int = 128, **changes: Any) -> dict[str, Any]:
    shapes = {"q": (2, 256, 8, head_dim), "k": (2, 256, 2, head_dim), "v": (2, 256, 2, head_dim)}
    arguments = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return arguments | {"lengths": jax.ShapeDtypeStruct((2,), jnp.int32)} | changes


def lower(function: Any, *arguments: Any, **options: Any) -> str:
    """Lowers a function for a GPU."""
    traced = jax.jit(functools.partial(function, **options)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def fitting(kernel: Any, head_dim: int) -> list[Any]:
    return [x for x in tuning.candidates(kernel.Config) if hopper.fits(kernel.scratch(x, head_dim))]


def lse(q: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    batch, tokens, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_lower_without_a_gpu(head_dim: int, dtype: Any, window: int | None) -> None:
    q, k, v, lengths = abstract(dtype, head_dim).values()
    options = {"scale": 0.1, "window": window}
    config = flash_attention.heuristic_config(head_dim)
    assert "@mosaic_gpu" in lower(flash_attention.flash_attention, q, k, v, lengths, **options, config=config)
    config = column_sums.heuristic_config(head_dim)
    assert "@mosaic_gpu" in lower(column_sums.column_sums, q, k, lse(q), lengths, **options, config=config)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_config_lowers_without_a_gpu(head_dim: int) -> None:
    q, k, v, lengths = abstract(head_dim=head_dim).values()
    options = {"scale": 0.1, "window": None}
    for config in fitting(flash_attention, head_dim):
        assert "@mosaic_gpu" in lower(flash_attention.flash_attention, q, k, v, lengths, **options, config=config)
    for config in fitting(column_sums, head_dim):
        assert "@mosaic_gpu" in lower(column_sums.column_sums, q, k, lse(q), lengths, **options, config=config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (abstract(jnp.float32), NotImplementedError, "q.dtype=float32"),
        (abstract(head_dim=96), NotImplementedError, "head_dim=96"),
        ({"scale": -1.0}, NotImplementedError, "scale=-1.0"),
        ({"window": 0}, ValueError, "window=0"),
        ({"lengths": jax.ShapeDtypeStruct((3,), jnp.int32)}, ValueError, r"lengths has shape \(3,\)"),
        ({"q": jax.ShapeDtypeStruct((2, 256, 7, 128), jnp.bfloat16)}, ValueError, "7 query heads over 2 KV heads"),
        ({"k": jax.ShapeDtypeStruct((2, 255, 2, 128), jnp.bfloat16)}, ValueError, r"k \(2, 255, 2, 128\)"),
        ({"v": jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.float16)}, ValueError, "v float16"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pallas_kernels.prefill_attention(**({"scale": 1.0, "with_scores": True} | abstract() | change))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_reason_is_given() -> None:
    assert pallas_kernels.why_unavailable()
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU"):
        pallas_kernels.prefill_attention(**abstract(), scale=1.0, with_scores=False)


def test_a_config_that_does_not_fit_is_rejected() -> None:
    q, k, v, lengths = abstract().values()
    config = flash_attention.Config(stages=4)
    assert hopper.fits(flash_attention.scratch(config, 64))
    with pytest.raises(ValueError, match=r"stages=4.* needs 2\d{5} bytes"):
        flash_attention.flash_attention(q, k, v, lengths, scale=1.0, window=None, config=config)
    config = column_sums.Config(stages=8)
    assert hopper.fits(column_sums.scratch(config, 64))
    with pytest.raises(ValueError, match=r"stages=8.* needs 3\d{5} bytes"):
        column_sums.column_sums(q, k, lse(q), lengths, scale=1.0, window=None, config=config)


def test_heads_are_divided_among_blocks_where_there_are_few() -> None:
    assert hopper.MULTIPROCESSORS == 132
    assert [column_sums.parts_of(6, tiles, 8) for tiles in (32, 16, 10, 5, 1)] == [1, 2, 3, 6, 6]


def test_log2_is_exact_to_a_unit_and_a_half_in_the_last_place() -> None:
    """The unit is that of the result, or of 1 for smaller results."""
    rng = np.random.default_rng(0)
    x = np.exp2(np.concatenate([rng.uniform(-20, 20, 100_000), rng.uniform(-1e-3, 1e-3, 1000), np.arange(-20.0, 20)]))
    exact = np.log2(x.astype(np.float32).astype(np.float64))
    error = np.asarray(flash_attention.log2(jnp.asarray(x, jnp.float32)), np.float64) - exact
    assert (np.abs(error) <= 1.5 * np.spacing(np.maximum(np.abs(exact), 1).astype(np.float32))).all()
    assert abs(error.mean()) < 1e-8


@pytest.mark.parametrize(
    ("streams", "mebibytes", "section"),
    [(1, 2, 1), (8, 4, 4), (256, 2, 8), (40, 2, 8), (17, 2, 1), (8, 16, 2), (9, 64, 1)],
)
def test_blocks_start_in_sections_that_the_cache_holds(streams: int, mebibytes: int, section: int) -> None:
    assert hopper.streams_per_section(streams, mebibytes << 20) == section


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (flash_attention.Config, {"block_kv": 96}),
        (flash_attention.Config, {"stages": 1}),
        (column_sums.Config, {"warpgroups": 1}),
        (column_sums.Config, {"block_q": 96}),
    ],
)
def test_wrong_configs_are_named(config: type[tuning.Config], options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        config(**options)
