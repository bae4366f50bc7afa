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
from cuda_ffi import registration
from cuda_ffi.arrays import BITS, GROUP_SIZES, PLANES


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", BITS)
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
    for tokens, head_dim, metadata in ((32, 32, "float16"), (96, 224, "float8_e4m3fn"), (160, 64, "bfloat16")):
        x = inputs(np.random.default_rng(tokens), (1, 1, tokens, head_dim), "bfloat16")
        check_definition(cuda_ffi.quantize, x, 3, 16, axis, metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [2, 4])
def test_factors_of_the_packing_block_of_three_bits_beside(axis: str, bits: int) -> None:
    for head_dim in (64, 96, 256):
        x = inputs(np.random.default_rng(head_dim), (2, 3, 384, head_dim), "bfloat16")
        check_definition(cuda_ffi.quantize, x, bits, 16, axis, "float8_e4m3fn", 32)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [2, 3])
def test_nan_stays_in_its_group(axis: str, bits: int) -> None:
    check_nan_stays_in_its_group(cuda_ffi.quantize, axis, bits)


@pytest.mark.parametrize("metadata", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (3, 3), (3, 2), (4, 3)])
def test_quantize_and_append_lower_without_a_gpu(
    k_bits: int, v_bits: int, metadata: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one call of its handler; append returns the arrays that quantize stores, in their buffers."""
    monkeypatch.setattr(registration, "load", lambda: None)
    storage = cuda_ffi.Storage(k_bits, v_bits, 16)
    options = {"metadata_dtype": metadata, "factor_block": storage.packing_block, "group_size": 16}

    def store(x: jax.Array) -> tuple[Any, Any]:
        k = cuda_ffi.quantize(x, bits=k_bits, axis="tokens", **options)
        return k, cuda_ffi.quantize(x, bits=v_bits, axis="channels", **options)

    tail = jax.ShapeDtypeStruct((2, 2, 96, 128), jnp.bfloat16)
    lowered = jax.jit(store).trace(tail).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@minikv_quantize") == 2
    k, v = lowered.out_info
    for side, bits, axis in ((k, k_bits, "tokens"), (v, v_bits, "channels")):
        want = quantize(np.zeros(tail.shape), bits, 16, axis, metadata, storage.packing_block)
        stored = jax.tree.leaves(side)
        assert [(x.shape, x.dtype) for x in stored] == [(x.shape, x.dtype) for x in want.arrays]

    length: Any = jax.ShapeDtypeStruct((2,), jnp.int32)
    packed, tails = cuda_ffi.Region(k, v, length), cuda_ffi.Region(tail, tail, length)
    token = jax.ShapeDtypeStruct((2, 2, 128), jnp.bfloat16)
    run: Any = functools.partial(cuda_ffi.append, storage=storage, sinks=4, block=32)
    lowered = jax.jit(run).trace(token, token, length, packed, tails).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("@minikv_append") == 1
    assert text.count("output_operand_alias<") == 2 + 14
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in ((packed, tails), lowered.out_info))
    assert before == after


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
        (36, 4, 32, 16, 3, 3, "bfloat16", 128, "float8_e4m3fn"),
        (101, 4, 96, 16, 3, 2, "bfloat16", 256, "float8_e4m3fn"),
        (64, 0, 64, 16, 4, 3, "float16", 64, "float16"),
        (70, 2, 64, 32, 3, 3, "bfloat16", 96, "bfloat16"),
        (90, 2, 64, 64, 2, 3, "float32", 128, "float8_e4m3fn"),
        (400, 4, 384, 128, 3, 4, "bfloat16", 256, "bfloat16"),
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
    storage = cuda_ffi.Storage(k_bits, v_bits, group_size)
    package: Any = cuda_ffi  # its values hold NumPy arrays here

    def zeros(rows: int, columns: int, dtype: str | type) -> np.ndarray:
        return np.zeros((batch, kv_heads, rows, columns), DTYPES[dtype] if isinstance(dtype, str) else dtype)

    def empty(bits: int, rows: int, columns: int) -> Any:
        planes = tuple(zeros(packed_capacity * width // 32, head_dim, np.uint32) for width in PLANES[bits])
        blocks = (zeros(packed_capacity // storage.packing_block, 1, np.float32) for _ in range(2))
        factors = tuple(blocks) if metadata == "float8_e4m3fn" else None
        return package.Packed(planes, zeros(rows, columns, metadata), zeros(rows, columns, metadata), factors)

    groups = packed_capacity // group_size
    packed = package.Region(
        empty(k_bits, groups, head_dim),
        empty(v_bits, packed_capacity, head_dim // group_size),
        np.zeros(batch, np.int32),
    )
    tail_length = np.array([0, 5, capacity - 1], np.int32)
    tail = package.Region(zeros(capacity, head_dim, dtype), zeros(capacity, head_dim, dtype), tail_length)
    options = {"storage": storage, "sinks": sinks, "block": block}
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
                    tokens = side[b, :, sinks : sinks + block]
                    part = quantize(tokens, bits, group_size, axis, metadata, storage.packing_block)
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
        ({"k_bits": 8}, "k_bits=8: the CUDA append kernel supports 2, 3, 4"),
        ({"v_bits": 1}, "v_bits=1"),
        ({"k_bits": 3}, "packed.k has 1 planes: expected 2 for 3 bits"),
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
        ({"bits": 8}, "bits=8"),
        ({"group_size": 8}, "group_size=8"),
        ({"metadata_dtype": "float32"}, "metadata_dtype=float32"),
        ({"metadata_dtype": "float8_e4m3fn", "factor_block": 64}, "factor_block=64: .* supports 16, 32"),
        ({"bits": 3, "metadata_dtype": "float8_e4m3fn", "factor_block": 16}, "factor_block=16: .* supports 32"),
        ({"bits": 4, "axis": "channels", "x": jnp.zeros((1, 1, 24, 128))}, "24 tokens: .* multiples of 16"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, message: str) -> None:
    x = jnp.zeros((1, 1, 128, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        cuda_ffi.quantize(**({"x": x, "bits": 2, "group_size": 16, "axis": "tokens"} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": "heads"}, "axis='heads'"),
        ({"x": jnp.zeros((1, 1, 80, 128))}, "expected a multiple of 32 tokens and whole groups of 16"),
        ({"x": jnp.zeros((1, 1, 96, 96)), "group_size": 64, "axis": "channels"}, "whole groups of 64"),
    ],
)
def test_sizes_of_three_bits_that_do_not_divide(change: dict, message: str) -> None:
    options: dict[str, Any] = {"x": jnp.zeros((1, 1, 64, 64)), "bits": 3, "group_size": 16, "axis": "tokens"}
    with pytest.raises(ValueError, match=message):
        cuda_ffi.quantize(**(options | change))
