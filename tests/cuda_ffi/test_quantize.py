"""Quantisation and append on the GPU: bit-equal to the definition."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.cuda_ffi_reference import DTYPES, Packed, quantize
from support.quantize_checks import check_definition, check_nan_stays_in_its_group, inputs, same_bits

import cuda_ffi
from cuda_ffi.quantize import GROUP_SIZES


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


def pack_block(cache: dict, row: int, start: int, part: Packed, name: str) -> None:
    old = (*cache[f"{name}_planes"], cache[f"{name}_scale"], cache[f"{name}_zero"], *cache.get(f"{name}_factors", ()))
    for whole, new in zip(old, part.arrays, strict=True):
        ratio = cache["capacity"] // whole.shape[2]
        whole[row, :, start // ratio : start // ratio + new.shape[1]] = new


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
    batch, kv_heads, packed = 3, 2, 3 * block
    shape = (batch, kv_heads)
    cache = {
        "capacity": packed,
        "k_planes": (np.zeros((*shape, packed * k_bits // 32, head_dim), np.uint32),),
        "v_planes": (np.zeros((*shape, packed * v_bits // 32, head_dim), np.uint32),),
        "k_scale": np.zeros((*shape, packed // group_size, head_dim), DTYPES[metadata]),
        "k_zero": np.zeros((*shape, packed // group_size, head_dim), DTYPES[metadata]),
        "v_scale": np.zeros((*shape, packed, head_dim // group_size), DTYPES[metadata]),
        "v_zero": np.zeros((*shape, packed, head_dim // group_size), DTYPES[metadata]),
        "tail_k": np.zeros((*shape, capacity, head_dim), DTYPES[dtype]),
        "tail_v": np.zeros((*shape, capacity, head_dim), DTYPES[dtype]),
        "packed_length": np.zeros(batch, np.int32),
        "tail_length": np.array([0, 5, capacity - 1], np.int32),
    }
    if metadata == "float8_e4m3fn":
        for name in ("k_factors", "v_factors"):
            cache[name] = tuple(np.zeros((*shape, packed // group_size, 1), np.float32) for _ in range(2))
    device = {key: jax.tree.map(jnp.array, value) for key, value in cache.items() if key != "capacity"}
    step = jax.jit(
        lambda cache, k, v, count: cuda_ffi.append(
            k, v, count, **cache, k_bits=k_bits, v_bits=v_bits, group_size=group_size, sinks=sinks, block=block
        ),
        donate_argnums=0,
    )
    for _ in range(2 * block + 3):
        k, v = (rng.normal(size=(*shape, head_dim)).astype(DTYPES[dtype]) for _ in range(2))
        count = rng.integers(0, 4, batch).clip(0, 1).astype(np.int32)
        device = step(device, jnp.asarray(k), jnp.asarray(v), jnp.asarray(count))
        for b in range(batch):
            n = cache["tail_length"][b]
            if count[b]:
                cache["tail_k"][b, :, n], cache["tail_v"][b, :, n] = k[b], v[b]
                n += 1
            if n == capacity:
                start = int(cache["packed_length"][b])
                for name, bits, axis in (("k", k_bits, "tokens"), ("v", v_bits, "channels")):
                    tail = cache[f"tail_{name}"]
                    part = quantize(tail[b, :, sinks : sinks + block], bits, group_size, axis, metadata)
                    pack_block(cache, b, start, part, name)
                    tail[b, :, sinks : capacity - block] = tail[b, :, sinks + block :].copy()
                cache["packed_length"][b] += block
                n -= block
            cache["tail_length"][b] = n
    for name, value in device.items():
        for got, want in zip(jax.tree.leaves(value), jax.tree.leaves(cache[name]), strict=True):
            assert same_bits(np.asarray(got), want), name


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
