"""The Pallas decode attention: on the GPU against float64 attention; lowering and refusals anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import decode_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_checks import Case, abstract, check

import pallas_kernels
from pallas_kernels import hopper
from pallas_kernels.decode_attention import Config, Storage, heuristic_config, launch, scratch

CASES = decode_checks.CASES | {
    "float16": Case(dtype="float16"),
    "head_dim 64, groups of 64": Case(head_dim=64, group_size=64, k_bits=4, v_bits=4, metadata="bfloat16"),
    "head_dim 64, groups of 32": Case(head_dim=64, group_size=32, k_bits=4, v_bits=2, group=3),
    "edges of tiles": Case(batch=4, packed=1536, lengths=((496, 63), (512, 64), (528, 65), (1024, 1))),
    "capacity between tiles": Case(packed=912, lengths=((912, 3), (528, 0))),
    "more splits than tiles": Case(packed=2048, config=Config(splits=12, stages=2)),
    "a ring of two": Case(packed=8192, config=Config(splits=2, stages=2), lengths=((8192, 96), (4112, 96))),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_attention_over_the_dequantised_cache(name: str) -> None:
    check(pallas_kernels.decode_attention, CASES[name], seed=len(name))


def random_case(seed: int) -> Case:
    return decode_checks.random_case(np.random.default_rng(seed), [64, 128], ["float16", "bfloat16"], 4096)


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


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_kernel_lowers_without_a_gpu(storage: Storage) -> None:
    """For a capacity that is a multiple of the group alone."""
    x = abstract(Case(packed=1024 + storage.group_size, **dataclasses.asdict(storage)))

    def run(x: dict[str, Any]) -> jax.Array:
        words, metadata = (x["k_planes"][0], x["v_planes"][0]), (x["k_scale"], x["k_zero"], x["v_scale"], x["v_zero"])
        tail, lengths = (x["tail_k"], x["tail_v"]), (x["packed_length"], x["tail_length"])
        return launch(x["q"], words, metadata, tail, lengths, scale=0.1, storage=storage)

    lowered = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_heuristic_config_fits(storage: Storage) -> None:
    for rows, tokens in ((8, 131072), (64, 32768), (256, 32768), (3, 128)):
        config = heuristic_config(rows, tokens, storage)
        hopper.check_shared_memory(scratch(config, storage, jnp.float16), config)
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


def test_8_bit_metadata_is_refused_by_name() -> None:
    arguments = abstract(Case(metadata="float8_e4m3fn"))
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        pallas_kernels.decode_attention(**arguments, k_bits=2, v_bits=2, group_size=16, scale=0.1)


@pytest.mark.parametrize("options", [{"stages": 1}, {"splits": 0}])
def test_wrong_configs_are_named(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Config(**({"stages": 2, "splits": 1} | options))
