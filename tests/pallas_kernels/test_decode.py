"""The Pallas decode attention: on the GPU against float64 attention; lowering and refusals anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import decode_checks
from support.decode_checks import Case, abstract, check

import pallas_kernels
from pallas_kernels import hopper
from pallas_kernels.decode_attention import Config, Storage, heuristic_config, launch, scratch

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
    # 57 factors a row, which no copy can read where they lie.
    "8-bit metadata, capacity between tiles": Case(metadata=FLOAT8, packed=912, lengths=((912, 3), (528, 0))),
    "8-bit metadata, long rows": Case(
        metadata=FLOAT8, packed=16384, tail=64, config=Config(splits=2, stages=3), lengths=((16384, 64), (8208, 1))
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_attention_over_the_dequantised_cache(name: str) -> None:
    check(pallas_kernels.decode_attention, CASES[name], seed=len(name))


def random_case(seed: int) -> Case:
    return decode_checks.random_case(np.random.default_rng(seed), [64, 128], ["float16", "bfloat16", FLOAT8], 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int) -> None:
    check(pallas_kernels.decode_attention, random_case(seed), seed)


# Anywhere -----------------------------------------------------------------------------------------


STORAGES = [
    Storage(*bits, group_size, head_dim)
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
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_kernel_lowers_without_a_gpu(storage: Storage, metadata: str) -> None:
    """For a capacity that is a multiple of the group alone."""
    x = abstract(Case(packed=1024 + storage.group_size, metadata=metadata, **dataclasses.asdict(storage)))

    def run(x: dict[str, Any]) -> jax.Array:
        words, metadata = (x["k_planes"][0], x["v_planes"][0]), (x["k_scale"], x["k_zero"], x["v_scale"], x["v_zero"])
        factors = (*(x["k_factors"] or ()), *(x["v_factors"] or ()))
        tail, lengths = (x["tail_k"], x["tail_v"]), (x["packed_length"], x["tail_length"])
        return launch(x["q"], words, metadata, factors, tail, lengths, scale=0.1, storage=storage)

    lowered = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_heuristic_config_fits(storage: Storage) -> None:
    for rows, tokens in ((8, 131072), (64, 32768), (256, 32768), (3, 128)):
        config = heuristic_config(rows, tokens, storage)
        for metadata in (jnp.float16, jnp.float8_e4m3fn):
            hopper.check_shared_memory(scratch(config, storage, metadata), config)
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
        ({"q": jax.ShapeDtypeStruct((2, 8, 64), jnp.bfloat16)}, ValueError, "k_planes has shape"),
        ({"tail_v": jax.ShapeDtypeStruct((2, 2, 95, 128), jnp.bfloat16)}, ValueError, "tail_v has shape"),
        ({"tail_k": jax.ShapeDtypeStruct((2, 2, 96, 128), jnp.float16)}, ValueError, "q's dtype"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = abstract(Case()) | {"k_bits": 2, "v_bits": 2, "group_size": 16, "scale": 0.1} | change
    with pytest.raises(error, match=message):
        pallas_kernels.decode_attention(**arguments)


def test_8_bit_metadata_need_bfloat16_queries_and_factors() -> None:
    options = {"k_bits": 2, "v_bits": 2, "group_size": 16, "scale": 0.1}
    with pytest.raises(NotImplementedError, match="dtype=float16"):
        pallas_kernels.decode_attention(**abstract(Case(metadata=FLOAT8, dtype="float16")), **options)
    arguments = abstract(Case(metadata=FLOAT8))
    with pytest.raises(ValueError, match="2 factors with float8_e4m3fn metadata: expected 4"):
        pallas_kernels.decode_attention(**(arguments | {"k_factors": None}), **options)
    factors = {name: arguments[name] for name in ("k_factors", "v_factors")}
    with pytest.raises(ValueError, match="4 factors with float16 metadata: expected 0"):
        pallas_kernels.decode_attention(**(abstract(Case()) | factors), **options)


@pytest.mark.parametrize("options", [{"stages": 1}, {"splits": 0}])
def test_wrong_configs_are_named(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Config(**({"stages": 2, "splits": 1} | options))
