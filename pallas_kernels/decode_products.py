"""The products of a warp of the decode kernel, the register layouts of their operands, and masks.

Operands are swapped, S^T = K Q^T and O^T = V^T P^T: the large operand is dequantised in registers and never written to
memory, the few queries of a KV head are the narrow one. Each warp takes 128 packed tokens (or 16 of the tail) of a tile
and shares nothing with the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fragments

QUERIES = 8  # queries per product
WARPS = 4  # warps per warpgroup
UNIT = 16  # tokens: packed lengths and groups are multiples
WARP_TOKENS = 128

_LANES = (("row", 8), ("quad", 4))


@dataclasses.dataclass(frozen=True)
class WarpLayout:
    """Register layouts of a warp's 128 tokens, in units of 16 tokens.

    As the tall operand of S^T, lane row `2 pair + odd` holds unit `pair + 4 odd`: after the transposition of P, lane
    column `quad` holds the probabilities of units `quad` and `quad + 4`, and those units' values are what it loads.
    """

    k_bits: int
    v_bits: int
    group_size: int
    head_dim: int

    @property
    def run(self) -> int:
        """Number of consecutive channels in a lane's row; they lie within one group of values."""
        return self.head_dim // 8

    @property
    def _steps(self) -> tuple[fragments.Factor, ...]:
        return (("step", self.head_dim // 16), ("quad", 4), ("element", 4))

    @property
    def queries(self) -> Any:
        return fragments.layout((("row", 8),), self._steps, lanes=_LANES)

    @property
    def k_words(self) -> Any:
        rows = (("warp", WARPS), ("odd", 2), ("pair", 4), ("half", self.k_bits // 2))
        return fragments.layout(rows, self._steps, lanes=(("pair", 4), ("odd", 2), ("quad", 4)))

    @property
    def k_metadata(self) -> Any:
        units = self.group_size // UNIT  # of a row
        pairs = min(units, 4)
        rows = [("warp", WARPS), ("odd", 2), ("pair", 4 // pairs)]
        if units == 8:
            rows.remove(("odd", 2))
        lanes = (("pair", 4 // pairs), ("copies", pairs), ("odd", 2), ("quad", 4))
        return fragments.layout(rows, self._steps, lanes=lanes)

    @property
    def v_words(self) -> Any:
        rows = (("warp", WARPS), ("unit", 2), ("quad", 4), ("half", self.v_bits // 2))
        columns = (("row", 8), ("register", self.run // 4), ("element", 4))
        return fragments.layout(rows, columns, lanes=_LANES)

    @property
    def v_metadata(self) -> Any:
        """Layout of `[TILE / g, H]`, which is `[TILE, H / g]` in rows of `g` tokens."""
        units, groups = self.group_size // UNIT, self.head_dim // self.group_size
        quads = min(units, 4)
        unit = [("unit", 2)]
        rows = [("warp", WARPS), *(unit if units < 8 else []), ("quad_row", 4 // quads)]
        columns = [*(unit if units == 8 else []), ("quad_column", quads), ("token", UNIT), ("group", groups)]
        lanes = (("group", groups), ("copies", 8 // groups), ("quad_row", 4 // quads), ("quad_column", quads))
        return fragments.layout(rows, (*columns, ("element", 1)), lanes=lanes)

    @property
    def tail_k(self) -> Any:
        return fragments.layout((("warp", WARPS), ("high", 2), ("row", 8)), self._steps, lanes=_LANES)

    @property
    def tail_v(self) -> Any:
        rows = (("warp", WARPS), ("high", 2), ("quad", 4), ("token", 2))
        return fragments.layout(rows, (("row", 8), ("register", self.run // 8), ("element", 8)), lanes=_LANES)


def per_warp(tiles: int) -> Any:
    """Layout of `[WARPS, 16 * tiles, QUERIES]`, the accumulators of `tiles` products of each warp."""
    tokens = (("tile", tiles), ("high", 2), ("row", 8))
    return fragments.layout((("warp", WARPS),), tokens, (("quad", 4), ("element", 2)), lanes=_LANES)


LOGITS, TAIL_LOGITS = per_warp(WARP_TOKENS // 16), per_warp(UNIT // 16)


def _result(layout: Any, rows: int) -> Any:
    return plgpu.ShapeDtypeStruct((WARPS, rows, QUERIES), jnp.float32, layout=layout)


def key_products(warp: WarpLayout, words: Any, scale: Any, zero: Any, queries: Any) -> jax.Array:
    """Logits `[WARPS, 128, QUERIES]`: tile `slots * h + j` holds slot `j` of both halves of each unit's word `h`."""
    halves, slots, steps = warp.k_bits // 2, 16 // warp.k_bits, warp.head_dim // 16
    arguments = (warp.k_words, warp.k_metadata, warp.k_metadata, warp.queries)

    def products(ctx, words, scale, zero, queries):
        del ctx
        words = fragments.registers(words, halves, steps)
        scale, zero, queries = (fragments.registers(x, steps) for x in (scale, zero, queries))
        acc = [fragments.zeros() for _ in range(halves * slots)]
        for half in range(halves):
            for step in range(steps):
                w = fragments.pairs(words[half, step])
                by_two = [(fragments.low_halves(*w[i : i + 2]), fragments.high_halves(*w[i : i + 2])) for i in (0, 2)]
                metadata = list(zip(fragments.pairs(scale[step]), fragments.pairs(zero[step]), strict=True))
                b = fragments.pairs(queries[step])
                for slot in range(slots):
                    a = [
                        fragments.dequantized(word, warp.k_bits, slot, *metadata[i])
                        for i in range(2)
                        for word in by_two[i]
                    ]
                    tile = half * slots + slot
                    acc[tile] = fragments.multiply(acc[tile], a, b)
        return fragments.assemble(acc, (WARPS, WARP_TOKENS, QUERIES), LOGITS)

    return plgpu.inline_mgpu(arg_types=arguments, return_type=_result(LOGITS, WARP_TOKENS))(products)(
        words, scale, zero, queries
    )


def value_products(warp: WarpLayout, out: Any, weights: Any, words: Any, scale: Any, zero: Any) -> jax.Array:
    """`out` plus the weighted values: `[WARPS, H, QUERIES]`, row `16 i + 8 h + r` being channel `run * r + 2 i + h`."""
    halves, slots, tiles = warp.v_bits // 2, 16 // warp.v_bits, warp.head_dim // 16
    k_tokens, v_tokens = 32 // warp.k_bits, 32 // warp.v_bits  # of a word
    out_layout = per_warp(tiles)
    arguments = (out_layout, LOGITS, warp.v_words, warp.v_metadata, warp.v_metadata)

    def products(ctx, out, weights, words, scale, zero):
        del ctx
        acc = list(fragments.registers(out, tiles, 2))
        words = fragments.registers(words, 2, halves, warp.run // 4)
        words = [[fragments.pairs(*words[unit, half]) for half in range(halves)] for unit in range(2)]
        scale, zero = fragments.registers(scale, 2, UNIT), fragments.registers(zero, 2, UNIT)
        weights = fragments.registers(weights, 8, 2)
        weights = [[fragments.transposed(fragments.rounded(x)) for x in row] for row in weights]

        def weight(token: int) -> Any:
            """The weights of one token in both of the lane's units."""
            half, place = divmod(token, k_tokens)
            high, slot = divmod(place, k_tokens // 2)
            return weights[half * k_tokens // 2 + slot][high]

        for half in range(halves):
            for slot in range(slots):
                first = half * v_tokens + slot
                second = first + slots
                both = weight(first), weight(second)
                b = fragments.low_halves(*both), fragments.high_halves(*both)
                metadata = [
                    [fragments.pair(x[unit, first], x[unit, second]) for x in (scale, zero)] for unit in range(2)
                ]
                for i in range(tiles):
                    a = [
                        fragments.dequantized(words[unit][half][2 * i + odd], warp.v_bits, slot, *metadata[unit])
                        for unit in range(2)
                        for odd in range(2)
                    ]
                    acc[i] = fragments.multiply(acc[i], a, b)
        return fragments.assemble(acc, (WARPS, warp.head_dim, QUERIES), out_layout)

    return plgpu.inline_mgpu(arg_types=arguments, return_type=_result(out_layout, warp.head_dim))(products)(
        out, weights, words, scale, zero
    )


def tail_key_products(warp: WarpLayout, keys: Any, queries: Any) -> jax.Array:
    """Logits of the tail `[WARPS, 16, QUERIES]`."""
    steps = warp.head_dim // 16

    def products(ctx, keys, queries):
        del ctx
        keys, queries = fragments.registers(keys, 2, steps), fragments.registers(queries, steps)
        acc = fragments.zeros()
        for step in range(steps):
            low, high = fragments.pairs(keys[0, step]), fragments.pairs(keys[1, step])
            acc = fragments.multiply(acc, [low[0], high[0], low[1], high[1]], fragments.pairs(queries[step]))
        return fragments.assemble([acc], (WARPS, UNIT, QUERIES), TAIL_LOGITS)

    return plgpu.inline_mgpu(arg_types=(warp.tail_k, warp.queries), return_type=_result(TAIL_LOGITS, UNIT))(products)(
        keys, queries
    )


def tail_value_products(warp: WarpLayout, out: Any, weights: Any, values: Any) -> jax.Array:
    """`out` plus the weighted values of the tail; the rows of the result are those of `value_products`."""
    tiles = warp.head_dim // 16
    out_layout = per_warp(tiles)

    def products(ctx, out, weights, values):
        del ctx
        acc = list(fragments.registers(out, tiles, 2))
        values = fragments.registers(values, 2, 2, warp.run // 8)
        values = [[fragments.pairs(*values[high, token]) for token in range(2)] for high in range(2)]
        b = [fragments.transposed(fragments.rounded(x)) for x in fragments.registers(weights, 2)]
        for i in range(tiles):
            a = []
            for high in range(2):
                both = values[high][0][i], values[high][1][i]
                a += [fragments.low_halves(*both), fragments.high_halves(*both)]
            acc[i] = fragments.multiply(acc[i], a, b)
        return fragments.assemble(acc, (WARPS, warp.head_dim, QUERIES), out_layout)

    return plgpu.inline_mgpu(
        arg_types=(out_layout, TAIL_LOGITS, warp.tail_v), return_type=_result(out_layout, warp.head_dim)
    )(products)(out, weights, values)


def by_channels(warp: WarpLayout, out: Any) -> jax.Array:
    """The output as `[WARPS, QUERIES, H]`, in the order of the channels; nothing moves between lanes."""
    columns = (("row", 8), ("register", warp.run // 4), ("element", 4))
    layout = fragments.layout((("warp", WARPS),), (("quad", 4), ("query", 2)), columns, lanes=_LANES)
    tiles = warp.head_dim // 16
    result = plgpu.ShapeDtypeStruct((WARPS, QUERIES, warp.head_dim), jnp.float32, layout=layout)

    def reordered(ctx, out):
        del ctx
        channels = list(fragments.registers(out, 2 * tiles))  # each of the lane's channels, for two queries
        registers = [
            [fragments.gather(channels[i : i + 4], query) for i in range(0, 2 * tiles, 4)] for query in range(2)
        ]
        return fragments.assemble(registers, (WARPS, QUERIES, warp.head_dim), layout)

    return plgpu.inline_mgpu(arg_types=(per_warp(tiles),), return_type=result)(reordered)(out)


def empty(warp: WarpLayout, lowest: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maxima, denominators and output before the first token; infinite maxima would make NaN."""
    layout = per_warp(warp.head_dim // 16)
    top = plgpu.layout_cast(jnp.full((WARPS, QUERIES), lowest, jnp.float32), layout.reduce(1))
    total = plgpu.layout_cast(jnp.zeros((WARPS, QUERIES), jnp.float32), layout.reduce(1))
    return top, total, plgpu.layout_cast(jnp.zeros((WARPS, warp.head_dim, QUERIES), jnp.float32), layout)


def scaled(x: jax.Array, factors: jax.Array, layout: Any) -> jax.Array:
    """Metadata times the factor of their row, float32."""
    spread = plgpu.layout_cast(lax.broadcast_in_dim(factors, x.shape, (0,)), layout)
    return x.astype(jnp.float32) * spread


def over_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats one value per query, `[WARPS, QUERIES]`, over the rows of `shape`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0, 2)), per_warp(shape[1] // 16))


def mask_logits(logits: jax.Array, units: jax.Array) -> jax.Array:
    """Masks the logits of a tile beyond its first `units` units."""
    warp, row = (plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=LOGITS) for axis in (0, 1))
    row = lax.rem(row, jnp.int32(8))
    unit = warp * (WARP_TOKENS // UNIT) + lax.div(row, jnp.int32(2)) + 4 * lax.rem(row, jnp.int32(2))
    return jnp.where(unit < units, logits, -jnp.inf)


def mask_metadata(warp: WarpLayout, x: jax.Array, units: jax.Array) -> jax.Array:
    """Clears the metadata of missing units, which may be NaN: NaN times a weight of 0 is NaN."""
    layout = warp.v_metadata
    row, column = (plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=layout) for axis in (0, 1))
    values = UNIT * warp.head_dim // warp.group_size  # of a unit
    unit = lax.div(row * warp.head_dim + column, jnp.int32(values))
    return jnp.where(unit < units, x, jnp.float16(0))


def mask_tail_logits(logits: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Masks all but the tokens `first .. last - 1` of a tile."""
    warp, row = (plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=TAIL_LOGITS) for axis in (0, 1))
    token = warp * UNIT + row
    return jnp.where((token >= first) & (token < last), logits, -jnp.inf)


def mask_tail_values(warp: WarpLayout, values: jax.Array, last: jax.Array) -> jax.Array:
    """Clears the values from token `last` on, which may be NaN."""
    token = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=warp.tail_v)
    return jnp.where(token < last, values, jnp.float16(0))
