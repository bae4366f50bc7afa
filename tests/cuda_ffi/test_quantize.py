"""Tests CUDA quantisation and append bit for bit against the definition."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.layout import DTYPES, quantize
from support.decode_checks import Case, abstract
from support.quantize_checks import check_definition, check_nan_stays_in_its_group, inputs, same_bits

import cuda_ffi
from cuda_ffi.arrays import GROUP_SIZES


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_quantize_is_the_definition_bit_for_bit(axis: str, bits: int, group_size: int) -> None:
    rng = np.random.default_rng(bits + group_size)
    for head_dim in (64, 96, 128, 256):
        if head_dim % group_size:
            continue
        # All nine pairs over the four group sizes.
        pairs = list(itertools.product(("float32", "bfloat16", "float16"), ("float16", "bfloat16", "float8_e4m3fn")))
        for dtype, metadata in pairs[GROUP_SIZES.index(group_size) :: 4]:
            x = inputs(rng, (2, 3, 384, head_dim), dtype)
            check_definition(cuda_ffi.quantize, x, bits, group_size, axis, metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_a_number_of_slabs_that_fills_no_thread_block(axis: str) -> None:
    for tokens, head_dim, metadata in ((16, 32, "float16"), (48, 224, "float8_e4m3fn"), (80, 64, "bfloat16")):
        x = inputs(np.random.default_rng(tokens), (1, 1, tokens, head_dim), "bfloat16")
        check_definition(cuda_ffi.quantize, x, 2, 16, axis, metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_nan_stays_in_its_group(axis: str) -> None:
    check_nan_stays_in_its_group(cuda_ffi.quantize, axis)


def write_block(packed: Any, row: int, share: float, block: Any) -> None:
    """Writes a packed block of one row, starting at a `share` of each array's capacity."""
    for array, new in zip(jax.tree.leaves(packed), block.arrays, strict=True):
        start = round(share * array.shape[2])
        array[row, :, start : start + new.shape[1]] = new


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("capacity", "sinks", "block", "group_size", "k_bits", "v_bits", "dtype", "head_dim", "metadata"),
    [
        (36, 4, 32, 16, 2, 2, "bfloat16", 128, "float16"),
        (32, 0, 32, 32, 4, 4, "float16", 64, "bfloat16"),
        (90, 2, 64, 64, 2, 4, "float32", 128, "float16"),
        (64, 0, 16, 16, 4, 2, "bfloat16", 96, "float8_e4m3fn"),
        (90, 2, 64, 32, 2, 4, "float32", 64, "float8_e4m3fn"),
        (160, 4, 128, 128, 2, 2, "bfloat16", 256, "float8_e4m3fn"),
        (200, 4, 192, 64, 4, 2, "bfloat16", 256, "float8_e4m3fn"),  # three teams, two at a time
        (400, 4, 384, 128, 2, 4, "bfloat16", 256, "float16"),  # three teams, one at a time
    ],
)
def test_append_writes_and_flushes_in_place(
    capacity: int,
    sinks: int,
    block: int,
    group_size: int,
    k_bits: int,
    v_bits: int,
    dtype: str,
    head_dim: int,
    metadata: str,
) -> None:
    rng = np.random.default_rng(capacity)
    batch, kv_heads, packed_capacity = 3, 2, 3 * block
    package: Any = cuda_ffi  # its values hold NumPy arrays here

    def zeros(rows: int, columns: int, dtype: str | type) -> np.ndarray:
        return np.zeros((batch, kv_heads, rows, columns), DTYPES[dtype] if isinstance(dtype, str) else dtype)

    def empty(bits: int, rows: int, columns: int) -> Any:
        words = zeros(packed_capacity * bits // 32, head_dim, np.uint32)
        blocks = (zeros(packed_capacity // group_size, 1, np.float32) for _ in range(2))
        factors = tuple(blocks) if metadata == "float8_e4m3fn" else None
        return package.Packed((words,), zeros(rows, columns, metadata), zeros(rows, columns, metadata), factors)

    groups = packed_capacity // group_size
    packed = package.Region(
        empty(k_bits, groups, head_dim),
        empty(v_bits, packed_capacity, head_dim // group_size),
        np.zeros(batch, np.int32),
    )
    tail_length = np.array([0, 5, capacity - 1], np.int32)
    tail = package.Region(zeros(capacity, head_dim, dtype), zeros(capacity, head_dim, dtype), tail_length)
    options = {"storage": cuda_ffi.Storage(k_bits, v_bits, group_size), "sinks": sinks, "block": block}
    step = jax.jit(functools.partial(cuda_ffi.append, **options), donate_argnames=("packed", "tail"))
    device = jax.tree.map(jnp.array, (packed, tail))
    for _ in range(2 * block + 3):
        k, v = (rng.normal(size=(batch, kv_heads, head_dim)).astype(DTYPES[dtype]) for _ in range(2))
        count = rng.integers(0, 4, batch).clip(0, 1).astype(np.int32)
        device = step(jnp.asarray(k), jnp.asarray(v), jnp.asarray(count), packed=device[0], tail=device[1])
        for b in range(batch):
            n = tail.length[b]
            if count[b]:
                tail.k[b, :, n], tail.v[b, :, n] = k[b], v[b]
                n += 1
            if n == capacity:
                share = packed.length[b] / packed_capacity
                for name, bits, axis in (("k", k_bits, "tokens"), ("v", v_bits, "channels")):
                    side = getattr(tail, name)
                    part = quantize(side[b, :, sinks : sinks + block], bits, group_size, axis, metadata)
                    write_block(getattr(packed, name), b, share, part)
                    side[b, :, sinks : capacity - block] = side[b, :, sinks + block :].copy()
                packed.length[b] += block
                n -= block
            tail.length[b] = n
    for (path, got), want in zip(jax.tree.leaves_with_path(device), jax.tree.leaves((packed, tail)), strict=True):
        assert same_bits(np.asarray(got), want), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_bits": 3}, "k_bits=3"),
        ({"group_size": 8}, "group_size=8"),
        ({"block": 24}, "block=24"),
        ({"sinks": 70}, "sinks=70"),
    ],
)
def test_append_refuses_by_name(change: dict, message: str) -> None:
    inputs = abstract(cuda_ffi, Case())
    token: Any = jax.ShapeDtypeStruct((2, 2, 128), jnp.bfloat16)
    settings = {"k_bits": 2, "v_bits": 2, "group_size": 16, "sinks": 4, "block": 32} | change
    storage = cuda_ffi.Storage(settings.pop("k_bits"), settings.pop("v_bits"), settings.pop("group_size"))
    count: Any = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        cuda_ffi.append(token, token, count, inputs.packed, inputs.tail, storage=storage, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits=3"),
        ({"group_size": 8}, "group_size=8"),
        ({"metadata_dtype": "float32"}, "metadata_dtype=float32"),
        ({"metadata_dtype": "float8_e4m3fn", "factor_block": 32}, "factor_block=32"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, message: str) -> None:
    x = jnp.zeros((1, 1, 128, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        cuda_ffi.quantize(x, **({"bits": 2, "group_size": 16, "axis": "tokens"} | change))
