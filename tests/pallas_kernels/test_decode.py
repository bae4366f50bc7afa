"""Tests Pallas decode attention: against float64 on the GPU; lowering and refusals anywhere."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import decode_checks
from support.decode_checks import Case, abstract, check, options, refusal_arguments

import pallas_kernels
from pallas_kernels import hopper
from pallas_kernels.decode_attention import Config, heuristic_config, launch, scratch
from pallas_kernels.decode_products import WarpLayout

FLOAT8 = "float8_e4m3fn"
CASES = decode_checks.CASES | {
    "float16": Case(dtype="float16"),
    "head_dim 64, groups of 64": Case(head_dim=64, group_size=64, k_bits=4, v_bits=4, metadata="bfloat16"),
    "head_dim 64, groups of 32": Case(head_dim=64, group_size=32, k_bits=4, v_bits=2, group=3),
    "edges of tiles": Case(batch=4, packed=1536, lengths=((496, 63), (512, 64), (528, 65), (1024, 1))),
    "capacity between tiles": Case(packed=912, lengths=((912, 3), (528, 0))),
    "more splits than tiles": Case(packed=2048, config=Config(splits=12, stages=2)),
    "a ring of two": Case(packed=8192, config=Config(splits=2, stages=2), lengths=((8192, 96), (4112, 96))),
    "8-bit metadata": Case(metadata=FLOAT8),
    "8-bit metadata, 4 bits, groups of 32": Case(metadata=FLOAT8, k_bits=4, v_bits=4, group_size=32),
    "8-bit metadata, groups of 64": Case(metadata=FLOAT8, k_bits=4, group_size=64, group=3),
    "8-bit metadata, groups of 128": Case(metadata=FLOAT8, group_size=128, packed=3072, lengths=((3072, 5), (1280, 9))),
    "8-bit metadata, head_dim 64": Case(metadata=FLOAT8, head_dim=64, lengths=((512, 0), (48, 1))),
    "8-bit metadata, head_dim 64, groups of 64": Case(metadata=FLOAT8, head_dim=64, group_size=64, packed=2048),
    # 57 factors per row, which no copy can read in place.
    "8-bit metadata, capacity between tiles": Case(metadata=FLOAT8, packed=912, lengths=((912, 3), (528, 0))),
    "8-bit metadata, long rows": Case(
        metadata=FLOAT8, packed=16384, tail=64, config=Config(splits=2, stages=3), lengths=((16384, 64), (8208, 1))
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_attention_over_the_dequantised_cache(name: str) -> None:
    check(pallas_kernels, CASES[name], seed=len(name))


def random_case(seed: int) -> Case:
    return decode_checks.random_case(np.random.default_rng(seed), [64, 128], ["float16", "bfloat16", FLOAT8], 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int) -> None:
    check(pallas_kernels, random_case(seed), seed)


# Anywhere -----------------------------------------------------------------------------------------


LAYOUTS = [
    WarpLayout(*bits, group_size, head_dim)
    for bits, group_size, head_dim in (
        ((2, 2), 16, 128),
        ((4, 4), 32, 128),
        ((2, 4), 64, 128),
        ((4, 2), 128, 128),
        ((2, 2), 16, 64),
        ((4, 4), 32, 64),
        ((4, 2), 64, 64),
    )
]


@pytest.mark.parametrize("metadata", ["float16", FLOAT8])
@pytest.mark.parametrize("warp", LAYOUTS, ids=str)
def test_kernel_lowers_without_a_gpu(warp: WarpLayout, metadata: str) -> None:
    """The packed capacity is a multiple of the group size, but of nothing larger."""
    case = Case(packed=1024 + warp.group_size, metadata=metadata, **dataclasses.asdict(warp))
    run = functools.partial(launch, **options(pallas_kernels, case))
    lowered = jax.jit(run).trace(*abstract(pallas_kernels, case)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("warp", LAYOUTS, ids=str)
def test_the_heuristic_config_fits(warp: WarpLayout) -> None:
    for rows, tokens in ((8, 131072), (64, 32768), (256, 32768), (3, 128)):
        config = heuristic_config(rows, tokens, warp)
        for metadata in (jnp.float16, jnp.float8_e4m3fn):
            hopper.check_shared_memory(scratch(config, warp, metadata), config)
        assert config.splits * rows <= max(rows, hopper.MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_bits": 3}, NotImplementedError, "k_bits=3"),
        ({"v_bits": 8}, NotImplementedError, "v_bits=8"),
        ({"group_size": 8}, NotImplementedError, "group_size=8"),
        ({"scale": 0.0}, NotImplementedError, "scale=0.0"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 128), np.float32)}, NotImplementedError, "q.dtype=float32"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 96), jnp.bfloat16)}, NotImplementedError, "head_dim=96"),
        ({"q": jax.ShapeDtypeStruct((2, 7, 128), jnp.bfloat16)}, ValueError, "7 query heads over 2 KV heads"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 64), jnp.bfloat16)}, ValueError, r"k\.planes has shape"),
        ({"tail_v": jax.ShapeDtypeStruct((2, 2, 95, 128), jnp.bfloat16)}, ValueError, r"tail\.v has shape"),
        ({"tail_k": jax.ShapeDtypeStruct((2, 2, 96, 128), jnp.float16)}, ValueError, "q's dtype"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pallas_kernels.decode_attention(**refusal_arguments(pallas_kernels, change))


def test_float8_metadata_need_bfloat16_queries_and_factors() -> None:
    settings = options(pallas_kernels, Case())
    with pytest.raises(NotImplementedError, match="dtype=float16"):
        pallas_kernels.decode_attention(*abstract(pallas_kernels, Case(metadata=FLOAT8, dtype="float16")), **settings)
    inputs, plain = abstract(pallas_kernels, Case(metadata=FLOAT8)), abstract(pallas_kernels, Case())
    without = inputs.packed._replace(k=inputs.packed.k._replace(factors=None))
    with_factors = plain.packed._replace(v=plain.packed.v._replace(factors=inputs.packed.v.factors))
    for packed, message in ((without, "k has no factors with float8"), (with_factors, "v has factors with float16")):
        with pytest.raises(ValueError, match=message):
            pallas_kernels.decode_attention(inputs.q, packed, inputs.tail, **settings)


@pytest.mark.parametrize("options", [{"stages": 1}, {"splits": 0}])
def test_wrong_configs_are_named(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Config(**({"stages": 2, "splits": 1} | options))
