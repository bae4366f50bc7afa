"""Checks quantisation kernels bit for bit against the definition of the layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle.layout import DTYPES, quantize


def inputs(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draws channels of different sizes, with some constant groups."""
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=(*shape[:-2], 1, shape[-1])))
    x[..., : shape[-2] // 2, 1] = 3.25
    x[:, 0, 0, :] = 0.0
    return x.astype(DTYPES[dtype])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    )


def check_definition(
    kernel: Callable[..., Any],
    x: np.ndarray,
    bits: int,
    group_size: int,
    axis: str,
    metadata: str,
    factor_block: int | None = None,
) -> None:
    """Checks a kernel bit for bit, and a second run against the first."""
    expected = quantize(x, bits, group_size, axis, metadata, factor_block)
    options = {"group_size": group_size, "axis": axis, "metadata_dtype": metadata, "factor_block": factor_block}
    for _ in range(2):
        result = kernel(jnp.asarray(x), bits=bits, **options)
        for got, want in zip(jax.tree.leaves(result), expected.arrays, strict=True):
            assert same_bits(np.asarray(got), want), (x.shape, x.dtype, metadata, want.dtype)


def check_nan_stays_in_its_group(kernel: Callable[..., Any], axis: str, bits: int = 2) -> None:
    """Checks that NaN beyond a cache's length does not reach the groups before it."""
    x = inputs(np.random.default_rng(0), (1, 2, 128, 128), "bfloat16")
    expected = quantize(x[:, :, :64], bits, 16, axis, "float16")
    x[:, :, 64:] = np.nan
    result = kernel(jnp.asarray(x), bits=bits, group_size=16, axis=axis)
    for got, want in zip(jax.tree.leaves(result), expected.arrays, strict=True):
        assert same_bits(np.asarray(got)[:, :, : want.shape[2]], want)
