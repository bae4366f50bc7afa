"""Register layouts by name, and warp-level operations on registers (Mosaic GPU code, for `inline_mgpu`).

A warp's tensor-core instruction multiplies a 16 x 16 tile of the large operand by a 16 x 8 tile: lane `4 row + quad`
holds rows `row` and `row + 8` of columns `2 quad`, `2 quad + 1` and the same plus 8, two 16-bit values to a register.
Which rows and columns of an array these are is free, and chosen where the arrays are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Factor = tuple[str, int]
Pair = Any  # 32 bits: two 16-bit floats, or a word


def layout(*dimensions: Sequence[Factor], lanes: Sequence[Factor]) -> Any:
    """A register layout, from the factors of each dimension, slowest first.

    The factor "warp" goes over the warps of a warpgroup, those in `lanes` (slowest first) over the lanes of a warp,
    the last factor of the last dimension over the elements of a register, and every other one over registers. A warp
    or lane factor that no dimension has is replicated.
    """
    shape = [math.prod(size for _, size in factors) for factors in dimensions]
    tiles, position = [tuple(shape)], {}
    for axis, factors in enumerate(dimensions):
        for name, size in factors[:-1] if axis == len(dimensions) - 1 else factors:
            position[name] = len(tiles) * len(shape) - len(shape) + axis
            shape[axis] //= size
            tiles.append(tuple(shape))
    rank = len(tiles) * len(shape)

    def place(name: str, size: int) -> Any:
        return position[name] - rank if name in position else plgpu.Replicated(size)

    named = mgpu.TiledLayout(
        plgpu.Tiling(tuple(tiles)),
        warp_dims=(place("warp", 4),),
        lane_dims=tuple(place(*factor) for factor in lanes),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(named.tiling, named.warp_dims, named.lane_dims, named.vector_dim)


def registers(array: mgpu.FragmentedArray, *shape: int) -> np.ndarray:
    """Reshapes an array's registers to `shape`, one axis per factor that goes over registers."""
    return array.registers.reshape(shape)


def assemble(accumulators: Sequence[Sequence[Any]], shape: tuple[int, ...], array_layout: Any) -> mgpu.FragmentedArray:
    """Builds a float array of `shape` from its registers, in the order of its factors."""
    tiled = array_layout.to_mgpu()
    values = [register for accumulator in accumulators for register in accumulator]
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return mgpu.FragmentedArray(_registers=array.reshape(tiled.registers_shape(shape)), _layout=tiled, _is_signed=None)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _half2() -> ir.Type:
    return ir.VectorType.get((2,), ir.F16Type.get())


def _constant(value: int) -> ir.Value:
    return arith.constant(_i32(), value if value < 1 << 31 else value - (1 << 32))


def element(register: ir.Value, index: int) -> ir.Value:
    """One element of a register of several."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def pairs(*vectors: ir.Value) -> list[Pair]:
    """Splits registers into 32 bits each: pairs of 16-bit elements, or single 32-bit elements."""
    result = []
    for register in vectors:
        kind = ir.VectorType(register.type)
        count = kind.shape[0] * mgpu.bitwidth(kind.element_type) // 32
        words = vector.bitcast(ir.VectorType.get((count,), _i32()), register)
        result += [element(words, i) for i in range(count)]
    return result


def _vector2(low: ir.Value, high: ir.Value) -> ir.Value:
    kind = ir.VectorType.get((2,), low.type)
    return vector.from_elements(kind, [low, high])


def gather(vectors: Sequence[ir.Value], index: int) -> ir.Value:
    """A register of the `index`-th elements of several registers."""
    elements = [element(x, index) for x in vectors]
    return vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)


def pair(low: ir.Value, high: ir.Value) -> Pair:
    """A pair from two registers of one 16-bit element each."""
    return _bits(_vector2(element(low, 0), element(high, 0)))


def _bits(half2: ir.Value) -> Pair:
    return element(vector.bitcast(ir.VectorType.get((1,), _i32()), half2), 0)


def _halves(bits: Pair) -> ir.Value:
    return vector.bitcast(_half2(), vector.broadcast(ir.VectorType.get((1,), _i32()), bits))


def low_halves(a: Pair, b: Pair) -> Pair:
    """The low 16 bits of both."""
    return _asm(_i32(), "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", a, b)


def high_halves(a: Pair, b: Pair) -> Pair:
    """The high 16 bits of both."""
    return _asm(_i32(), "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", a, b)


def _asm(result: ir.Type, text: str, constraints: str, *operands: ir.Value) -> Any:
    return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=False)


def rounded(register: ir.Value) -> Pair:
    """Two float32 values as a pair of float16."""
    return _bits(arith.truncf(_half2(), register))


def elementwise(instruction: str, *arrays: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """Applies a PTX instruction with explicit rounding elementwise to float32 arrays in one layout.

    MLIR's quotients may be off by a unit in the last place, and its products are fused with sums.
    """
    f32, result = ir.F32Type.get(), np.empty_like(arrays[0].registers)
    text = f"{instruction} {', '.join(f'${i}' for i in range(len(arrays) + 1))};"
    constraints = ",".join(["=f", *["f"] * len(arrays)])
    for index, register in np.ndenumerate(arrays[0].registers):
        operands: list[Any] = [x.registers[index] for x in arrays]
        values = [
            _asm(f32, text, constraints, *(element(x, i) for x in operands))
            for i in range(ir.VectorType(register.type).shape[0])
        ]
        result[index] = vector.from_elements(register.type, values)
    return mgpu.FragmentedArray(_registers=result, _layout=arrays[0].layout, _is_signed=None)


def transposed(matrix: Pair) -> Pair:
    """An 8 x 8 matrix whose lane `4 row + quad` holds columns `2 quad` and `2 quad + 1`, transposed."""
    return _asm(_i32(), "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", matrix)


def dequantized(word: Pair, bits: int, slot: int, scale: Pair, zero: Pair) -> Pair:
    """`code * scale + zero`, rounded once, for the codes in place `slot` of both halves of a word.

    Converts no integer: bits below a power of two are a float16, exact once that power is subtracted.
    """
    low = slot * bits % 8
    if slot * bits >= 8:
        word = arith.shrui(word, _constant(8))
    mask, power = ((1 << bits) - 1) << low, 10 - low  # whose last place is worth 2**-low
    both = 1 << 16 | 1
    raised = _and_or(word, _constant(mask * both), _constant((15 + power << 10) * both))
    offset = arith.constant(ir.F16Type.get(), 2.0**power)
    codes = arith.subf(_halves(raised), vector.broadcast(_half2(), offset))
    return _fma(_bits(codes), scale, zero)


def _and_or(word: Pair, mask: Pair, bits: Pair) -> Pair:
    """`word & mask | bits` in one instruction; the compiler would use two for two constants."""
    return _asm(_i32(), "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", word, mask, bits)


def _fma(a: Pair, b: Pair, c: Pair) -> Pair:
    """`a * b + c` of float16, rounded once; MLIR's own is converted to float32 and back."""
    return _asm(_i32(), "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", a, b, c)


def zeros() -> list[ir.Value]:
    """An accumulator: rows `row` and `row + 8` of columns `2 quad` and `2 quad + 1`, in two registers."""
    zero = vector.broadcast(ir.VectorType.get((2,), ir.F32Type.get()), arith.constant(ir.F32Type.get(), 0.0))
    return [zero, zero]


def multiply(acc: Sequence[ir.Value], a: Sequence[Pair], b: Sequence[Pair]) -> list[ir.Value]:
    """`acc + a b` in float32, for float16 tiles of 16 x 16 (`a`) and 16 x 8 (`b`)."""
    f32 = ir.F32Type.get()
    sums = [element(register, i) for register in acc for i in range(2)]
    text = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    result = _asm(llvm.StructType.get_literal([f32] * 4), text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *a, *b, *sums)
    c = [llvm.extractvalue(f32, result, [i]) for i in range(4)]
    return [_vector2(c[0], c[1]), _vector2(c[2], c[3])]
