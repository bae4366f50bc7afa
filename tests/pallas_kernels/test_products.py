"""Tests the register layouts and products of the decode kernel lane by lane in NumPy, without a GPU.

The NumPy warp below implements only the tensor cores' instruction (`mma.m16n8k16`) and the transposition (`movmatrix`).
The kernel's own code decides which token and channel a register holds, and what is multiplied.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import numpy as np
import pytest
from oracle.layout import quantize

from pallas_kernels import decode_products, fragments
from pallas_kernels.decode_products import WarpLayout

TILE, TAIL_TILE = 512, 64
LAYOUTS = [
    WarpLayout(*bits, group_size, head_dim)
    for head_dim, group_sizes in ((64, (16, 32, 64)), (128, (16, 32, 64, 128)))
    for group_size in group_sizes
    for bits in ((2, 2), (4, 4), (2, 4), (4, 2))
]
LANES = [(lane, *divmod(lane, 4)) for lane in range(32)]  # lane, row, quad


def held(x: np.ndarray, layout: Any) -> np.ndarray:
    """Distributes `x` over a warpgroup's threads: `[4 warps, 32 lanes, registers, elements per register]`."""
    tiled = layout.to_mgpu()
    for tile in tiled.tiling.tiles:
        lead = x.ndim - len(tile)
        split = itertools.chain.from_iterable((n // t, t) for n, t in zip(x.shape[lead:], tile, strict=True))
        x = x.reshape(*x.shape[:lead], *split)
        x = x.transpose(*range(lead), *range(lead, x.ndim, 2), *range(lead + 1, x.ndim, 2))
    parts = [*tiled.warp_dims, *tiled.lane_dims]
    named = [x.ndim + part for part in parts if isinstance(part, int)]
    vector = x.ndim + tiled.vector_dim
    rest = [axis for axis in range(x.ndim) if axis not in (*named, vector)]
    x = x.transpose(*named, *rest, vector)
    for axis, part in enumerate(parts):
        if not isinstance(part, int):
            x = np.repeat(np.expand_dims(x, axis), part.times, axis)
    return x.reshape(4, 32, -1, x.shape[-1])


def put_back(x: np.ndarray, shape: tuple[int, ...], layout: Any) -> np.ndarray:
    """Collects the array that the threads hold as `x`."""
    whole = np.full(np.prod(shape), np.nan)
    whole[held(np.arange(whole.size).reshape(shape), layout).ravel()] = x.ravel()
    return whole.reshape(shape)


def multiply(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """Emulates `mma.m16n8k16`: four pairs `[4, 32, 2]` of a and two of b give `[4, 32, 4]`."""
    tall, narrow, out = np.zeros((4, 16, 16)), np.zeros((4, 16, 8)), np.zeros((4, 32, 4))
    for lane, row, quad in LANES:
        for i in range(4):
            column = 2 * quad + 8 * (i // 2)
            tall[:, row + 8 * (i % 2), column : column + 2] = a[i][:, lane]
        for i in range(2):
            narrow[:, 2 * quad + 8 * i : 2 * quad + 8 * i + 2, row] = b[i][:, lane]
    product = tall @ narrow
    for lane, row, quad in LANES:
        out[:, lane] = product[:, [row, row, row + 8, row + 8], [2 * quad, 2 * quad + 1] * 2]
    return out


class Fragments:
    """Emulates `pallas_kernels.fragments` on the NumPy warps, with arrays instead of MLIR values."""

    layout = staticmethod(fragments.layout)

    def registers(self, array: np.ndarray, *shape: int) -> np.ndarray:
        values = np.empty(shape, object)
        for i, index in enumerate(np.ndindex(*shape)):
            values[index] = array[:, :, i]
        return values

    def pairs(self, *vectors: np.ndarray) -> list[np.ndarray]:
        result = []
        for x in vectors:
            size = 1 if x.dtype == np.uint32 else 2
            parts = np.split(x, x.shape[-1] // size, -1)
            result += [part[..., 0] for part in parts] if size == 1 else parts
        return result

    def gather(self, vectors: list[np.ndarray], index: int) -> np.ndarray:
        return np.stack([x[..., index] for x in vectors], -1)

    def pair(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.concatenate([low, high], -1)

    def low_halves(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a & 0xFFFF | b << 16 if a.dtype == np.uint32 else np.stack([a[..., 0], b[..., 0]], -1)

    def high_halves(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a >> 16 | b & 0xFFFF0000 if a.dtype == np.uint32 else np.stack([a[..., 1], b[..., 1]], -1)

    def dequantized(self, word: np.ndarray, bits: int, slot: int, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        codes = [word >> (16 * half + bits * slot) & ((1 << bits) - 1) for half in range(2)]
        return np.stack(codes, -1) * scale + zero

    def rounded(self, register: np.ndarray) -> np.ndarray:
        return register

    def zeros(self) -> list[np.ndarray]:
        return [np.zeros((4, 32, 2)), np.zeros((4, 32, 2))]

    def multiply(self, acc: Any, a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
        return list(np.split(np.concatenate(list(acc), -1) + multiply(a, b), 2, -1))

    def transposed(self, matrix: np.ndarray) -> np.ndarray:
        """Emulates `movmatrix`."""
        whole, out = np.zeros((4, 8, 8)), np.zeros_like(matrix)
        for lane, row, quad in LANES:
            whole[:, row, 2 * quad : 2 * quad + 2] = matrix[:, lane]
        for lane, row, quad in LANES:
            out[:, lane] = whole[:, 2 * quad : 2 * quad + 2, row]
        return out

    def assemble(self, accumulators: Any, shape: tuple[int, ...], layout: Any) -> np.ndarray:
        return put_back(np.stack([x for acc in accumulators for x in acc], 2), shape, layout)


def inline_mgpu(*, arg_types: tuple, return_type: Any) -> Any:
    """Emulates `plgpu.inline_mgpu`: passes each argument as the threads hold it."""
    del return_type
    return lambda body: lambda *xs: body(None, *(held(x, t) for x, t in zip(xs, arg_types, strict=True)))


@pytest.fixture(autouse=True)
def _numpy_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(inline_mgpu=inline_mgpu, ShapeDtypeStruct=lambda *_, **__: None)
    monkeypatch.setattr(decode_products, "plgpu", fake)
    monkeypatch.setattr(decode_products, "fragments", Fragments())


def rows_to_tokens(layout: WarpLayout) -> np.ndarray:
    """Token of each row of a tile's logits, `[4, 128]`."""
    warp, tile, high, pair, odd = np.indices((4, 8, 2, 4, 2))
    half, slot = np.divmod(tile, 16 // layout.k_bits)
    place = (2 * half + high) * (16 // layout.k_bits) + slot
    return (128 * warp + 16 * (pair + 4 * odd) + place).reshape(4, 128)


def rows_to_channels(layout: WarpLayout) -> np.ndarray:
    """Channel of each row of the output, `[H]`."""
    tile, high, row = np.indices((layout.head_dim // 16, 2, 8))
    return (layout.run * row + 2 * tile + high).ravel()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_products_are_those_of_the_dequantised_tile(layout: WarpLayout) -> None:
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, TILE, layout.head_dim)).astype(np.float32)
    packed_k = quantize(k, layout.k_bits, layout.group_size, "tokens", "float16")
    packed_v = quantize(v, layout.v_bits, layout.group_size, "channels", "float16")
    queries, weights = rng.normal(size=(8, layout.head_dim)), rng.uniform(size=(TILE, 8))
    tokens, channels = rows_to_tokens(layout), rows_to_channels(layout)

    words, scale, zero = packed_k.arrays
    logits = decode_products.key_products(layout, words, scale, zero, queries)
    assert np.allclose(logits, (packed_k.dequantize() @ queries.T)[tokens])

    before = rng.normal(size=(4, layout.head_dim, 8))
    words, scale, zero = packed_v.arrays
    scale, zero = (x.reshape(-1, layout.head_dim) for x in (scale, zero))
    out = decode_products.value_products(layout, before, weights[tokens], words, scale, zero)
    by_warp = np.einsum("wth,wtq->whq", packed_v.dequantize().reshape(4, 128, -1), weights.reshape(4, 128, 8))
    assert np.allclose(out - before, by_warp[:, channels])
    ordered = decode_products.by_channels(layout, out - before)
    assert np.allclose(ordered, by_warp.swapaxes(1, 2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_with_the_tail(head_dim: int) -> None:
    rng, layout = np.random.default_rng(0), WarpLayout(2, 2, 16, head_dim)
    k, v = rng.normal(size=(2, TAIL_TILE, head_dim))
    queries, weights = rng.normal(size=(8, head_dim)), rng.uniform(size=(4, 16, 8))
    logits = decode_products.tail_key_products(layout, k, queries)
    assert np.allclose(logits, (k @ queries.T).reshape(4, 16, 8))
    out = decode_products.tail_value_products(layout, np.zeros((4, head_dim, 8)), weights, v)
    by_warp = np.einsum("wth,wtq->whq", v.reshape(4, 16, head_dim), weights)
    assert np.allclose(out, by_warp[:, rows_to_channels(layout)])


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_become_halves_exactly(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bit trick of `fragments.dequantized` gives `code * scale + zero`, rounded once, in NumPy's float16."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, 2048, dtype=np.uint32)
    scale, zero = (rng.normal(size=8192) * np.exp(2 * rng.normal(size=8192))).astype(np.float16).reshape(2, 2048, 2)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)

    numpy_arith = types.SimpleNamespace(
        shrui=np.right_shift,
        subf=np.subtract,
        constant=lambda _, value: np.float16(value),
    )
    monkeypatch.setattr(fragments, "arith", numpy_arith)
    monkeypatch.setattr(fragments, "_and_or", lambda word, mask, bits: word & mask | bits)
    monkeypatch.setattr(fragments, "_fma", fma)
    monkeypatch.setattr(fragments, "vector", types.SimpleNamespace(broadcast=lambda _, value: value))
    monkeypatch.setattr(fragments, "ir", types.SimpleNamespace(F16Type=types.SimpleNamespace(get=lambda: None)))
    monkeypatch.setattr(fragments, "_half2", lambda: None)
    monkeypatch.setattr(fragments, "_constant", np.uint32)
    monkeypatch.setattr(fragments, "_halves", lambda x: x.view(np.float16).reshape(-1, 2))
    monkeypatch.setattr(fragments, "_bits", lambda x: x)
    for slot in range(16 // bits):
        codes = np.stack([words >> (16 * half + bits * slot) & ((1 << bits) - 1) for half in range(2)], -1)
        result = fragments.dequantized(words, bits, slot, scale, zero)
        assert np.array_equal(result, fma(codes, scale, zero))
