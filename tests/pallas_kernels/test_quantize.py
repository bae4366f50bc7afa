"""Tests Pallas quantisation: bit-equal to the definition on the GPU; lowering and refusals anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quantize_checks import check_definition, check_nan_stays_in_its_group, inputs

import pallas_kernels
from pallas_kernels.quantize import launch

CASES = [
    (head_dim, group_size, axis, bits)
    for head_dim, group_size in ((64, 16), (64, 64), (128, 16), (128, 32), (128, 64), (128, 128))
    for axis in ("tokens", "channels")
    for bits in (2, 4)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "group_size", "axis", "bits"), CASES)
def test_quantize_is_the_definition_bit_for_bit(head_dim: int, group_size: int, axis: str, bits: int) -> None:
    rng = np.random.default_rng(head_dim + group_size + bits)
    # At most one warpgroup's rows, a remainder, and many tiles; 3 * 128 tokens are not a multiple of a tile.
    for batch, kv_heads, tokens, dtype, metadata in (
        (1, 1, group_size if axis == "tokens" else 16, "bfloat16", "float16"),
        (1, 3, 384, "float32", "bfloat16"),
        (2, 2, 1024, "float16", "float16"),
        (2, 5, 2048, "bfloat16", "float16"),
        (1, 1, group_size, "float16", "float8_e4m3fn"),
        (1, 3, 384, "float32", "float8_e4m3fn"),
        (2, 5, 2048, "bfloat16", "float8_e4m3fn"),
    ):
        x = inputs(rng, (batch, kv_heads, tokens, head_dim), dtype)
        check_definition(pallas_kernels.quantize, x, bits, group_size, axis, metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_nan_stays_in_its_group(axis: str) -> None:
    check_nan_stays_in_its_group(pallas_kernels.quantize, axis)


@pytest.mark.gpu
def test_every_float16_scale_is_inverted_exactly() -> None:
    """MLIR's division may be off by a unit in the last place, which no scale may show."""
    scales = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all from 0 to the largest
    steps = np.random.default_rng(0).uniform(0, 3, (16, scales.size)).astype(np.float32)
    steps[0], steps[1] = 0, 3
    x = (steps * scales).reshape(1, 1, 16, -1, 128).swapaxes(2, 3).reshape(1, 1, -1, 128)
    check_definition(pallas_kernels.quantize, x, 2, 16, "tokens", "float16")


@pytest.mark.parametrize("metadata", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize(("head_dim", "group_size", "axis", "bits"), CASES)
def test_kernel_lowers_without_a_gpu(head_dim: int, group_size: int, axis: str, bits: int, metadata: str) -> None:
    def run(x: jax.Array) -> tuple:
        return launch(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata)

    x = jax.ShapeDtypeStruct((2, 3, 256, head_dim), jnp.bfloat16)
    lowered = jax.jit(run).trace(x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, NotImplementedError, "bits=3"),
        ({"group_size": 8}, NotImplementedError, "group_size=8"),
        ({"metadata_dtype": "float32"}, NotImplementedError, "metadata_dtype=float32"),
        ({"factor_block": 32}, NotImplementedError, "factor_block=32"),
        ({"x": jax.ShapeDtypeStruct((1, 1, 128, 96), jnp.bfloat16)}, NotImplementedError, "head_dim=96"),
        ({"x": jax.ShapeDtypeStruct((1, 1, 128, 64), jnp.int8)}, NotImplementedError, "x.dtype=int8"),
        ({"axis": "heads"}, ValueError, "axis='heads'"),
        ({"x": jax.ShapeDtypeStruct((128, 64), jnp.bfloat16)}, ValueError, r"\(128, 64\)"),
        ({"x": jax.ShapeDtypeStruct((1, 1, 120, 64), jnp.bfloat16)}, ValueError, "whole groups of 16"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    x = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.bfloat16)
    with pytest.raises(error, match=message):
        pallas_kernels.quantize(**({"x": x, "bits": 2, "group_size": 16, "axis": "tokens"} | change))
