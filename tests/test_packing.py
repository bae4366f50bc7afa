"""Tests packing and quantisation bit for bit against the layout in NumPy."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import layout

from minikv_jax.packing import (
    BITS,
    GROUP_SIZES,
    METADATA_DTYPES,
    Packing,
    QuantizedArray,
    dequantize,
    encode_minmax,
    pack,
    unpack,
)

AXES = ("tokens", "channels")


class RoundTrip(NamedTuple):
    packed: QuantizedArray
    codes: jax.Array
    values: jax.Array


def round_trip(x: np.ndarray | jax.Array, **packing: Any) -> RoundTrip:
    return _round_trip(jnp.asarray(x), Packing(**packing))


@functools.partial(jax.jit, static_argnames="packing")
def _round_trip(x: jax.Array, packing: Packing) -> RoundTrip:
    packed = encode_minmax(x, packing)
    return RoundTrip(packed, unpack(packed.planes, packing.bits), dequantize(packed))


def check_against_layout(x: np.ndarray, result: RoundTrip, block: int, metadata_dtype: str) -> None:
    """Checks codes, words, scales, zeros and values of x[S, H] block by block."""
    got, codes, values = result.packed, np.asarray(result.codes), np.asarray(result.values)
    blocks = len(x) // block
    scales, zeros = (
        np.asarray(leaf).astype(np.float32).reshape(blocks, -1, leaf.shape[-1])
        * (1 if factor is None else np.asarray(factor)[:, None])
        for leaf, factor in ((got.scale, got.scale_factor), (got.zero, got.zero_factor))
    )
    for i in range(blocks):
        rows = slice(i * block, (i + 1) * block)
        want = layout.quantize(
            x[rows], got.packing.bits, got.packing.group_size, got.packing.axis, metadata_dtype, block
        )
        np.testing.assert_array_equal(scales[i], want.scale.value)
        np.testing.assert_array_equal(zeros[i], want.zero.value)
        assert want.adopt(codes[rows])
        # The product and the sum may be fused: one rounding of the larger of the two terms, in float32.
        np.testing.assert_allclose(
            values[rows],
            want.dequantize(),
            rtol=0,
            atol=2 * 2.0**-24 * max(1.0, 2 * np.abs(x.astype(np.float32)).max()),
        )
        for plane, words in zip(got.planes, want.planes, strict=True):
            np.testing.assert_array_equal(np.asarray(plane).reshape(blocks, -1, x.shape[1])[i], words)


@pytest.mark.parametrize("bits", BITS)
def test_pack_holds_every_code_in_every_lane(bits: int):
    tokens, channels = 256, 32  # at least one channel per lane, so that every code meets every lane
    codes = (np.arange(tokens)[:, None] + np.arange(channels)) % 2**bits
    planes = pack(jnp.asarray(codes, jnp.uint32), bits)
    for plane, words, width in zip(planes, layout.pack(codes, bits), layout.PLANES[bits], strict=True):
        assert plane.shape == (tokens * width // 32, channels)
        assert plane.dtype == jnp.uint32
        np.testing.assert_array_equal(plane, words)
    np.testing.assert_array_equal(unpack(planes, bits), codes)
    np.testing.assert_array_equal(layout.unpack([np.asarray(plane) for plane in planes], bits), codes)


def test_pack_has_leading_axes():
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 64, 5))
    planes = pack(jnp.asarray(codes, jnp.uint32), 3)
    for b, k in np.ndindex(2, 3):
        for plane, words in zip(planes, layout.pack(codes[b, k], 3), strict=True):
            np.testing.assert_array_equal(plane[b, k], words)
    np.testing.assert_array_equal(unpack(planes, 3), codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_matches_the_layout(bits: int, group_size: int):
    # The grid alternates axes and metadata dtypes; test_metadata tests all of them on one case.
    turn = BITS.index(bits) + GROUP_SIZES.index(group_size)
    axis, metadata_dtype = AXES[turn % 2], METADATA_DTYPES[turn % 3]
    block = 32 // min(layout.PLANES[bits]) if axis == "channels" else layout.packing_block(bits, group_size)
    shape = (2 * block, 2 * group_size) if axis == "channels" else (2 * block, 3)
    x = np.random.default_rng(bits * group_size).normal(0.3, 1.0, shape).astype(np.float32)
    got = round_trip(x, bits=bits, group_size=group_size, axis=axis, metadata_dtype=metadata_dtype, factor_block=block)
    check_against_layout(x, got, block, metadata_dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_metadata(metadata_dtype: str, dtype: str):
    """Channels have very different sizes; in 16 bits many quotients are ties, which go to the even code."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(512, 48)) * np.logspace(-4, 2, 48)
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for axis in AXES:
        arguments = {"bits": 2, "group_size": 16, "axis": axis, "metadata_dtype": metadata_dtype, "factor_block": 32}
        got = round_trip(x, **arguments)
        assert got.packed.scale.dtype == got.packed.zero.dtype == jnp.dtype(metadata_dtype)
        check_against_layout(x, got, 32, metadata_dtype)
        if metadata_dtype == "float16":  # uncompiled, with the same bits
            jax.tree.map(np.testing.assert_array_equal, got.packed, encode_minmax(jnp.asarray(x), Packing(**arguments)))


@pytest.mark.parametrize(("metadata_dtype", "bits"), [("float16", 1), ("bfloat16", 2), ("float8_e4m3fn", 8)])
def test_a_group_without_range_gives_itself(metadata_dtype: str, bits: int):
    # Values that 16-bit metadata holds exactly, down to its smallest; one constant per channel group and token group.
    constants = np.array(
        [0.0, -0.0, 1.5, -3.25, 2.0**-14, -448.0, 1024.0, -(2.0**-20) if "b" in metadata_dtype else 0.5]
    )
    by_channel = np.repeat(constants, 16)[None].repeat(32, 0).astype(np.float32)  # [32, 128]
    for axis in AXES:
        got = round_trip(
            by_channel, bits=bits, group_size=16, axis=axis, metadata_dtype=metadata_dtype, factor_block=32
        )
        assert not np.asarray(got.codes).any()
        assert not np.asarray(got.packed.scale).astype(np.float32).any()
        if metadata_dtype != "float8_e4m3fn":
            np.testing.assert_array_equal(got.values, by_channel)
        # 8-bit metadata is relative to the block's largest: alone in its block a constant is c / 448 * 448.
        alone = np.broadcast_to(constants[:, None, None], (8, 32, 16)).astype(np.float32)
        got = round_trip(alone, bits=bits, group_size=16, axis=axis, metadata_dtype=metadata_dtype, factor_block=32)
        np.testing.assert_allclose(got.values, alone, rtol=2**-22, atol=0)


@pytest.mark.parametrize("metadata_dtype", METADATA_DTYPES)
def test_extreme_values_stay_finite(metadata_dtype: str):
    """A block has outliers beyond float16, subnormal numbers, and flat groups beside wide ones."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(32, 64)).astype(np.float32)
    x[:, :16] *= 1e6
    x[:, 16:32] = 7.0
    x[:, 32:48] *= 1e-30
    x[3, 50], x[4, 50] = 1e5, -1e5
    for axis, tiny in itertools.product(AXES, (False, True)):
        block = x * np.float32(1e-38 if tiny else 1.0)
        got = round_trip(block, bits=2, group_size=16, axis=axis, metadata_dtype=metadata_dtype, factor_block=32)
        for leaf in jax.tree.leaves(got):
            assert np.isfinite(np.asarray(leaf).astype(np.float32)).all()
        if not tiny:  # whether subnormal numbers are flushed to zero is the platform's choice
            assert layout.quantize(block, 2, 16, axis, metadata_dtype, 32).adopt(np.asarray(got.codes))


def test_float16_metadata_clamps():
    x = np.array([[-1e6, -1e6], [1e6, 65504.0]], np.float32).repeat(16, 0)
    got = round_trip(x, bits=2, group_size=32, axis="tokens", metadata_dtype="float16")
    np.testing.assert_array_equal(got.packed.zero, np.array([[-65504.0, -65504.0]], np.float16))
    np.testing.assert_array_equal(got.packed.scale, np.array([[65504.0, 65504.0]], np.float16))
    # -1e6 is the clamped zero, code 0; 1e6 the last code; 65504 lies two scales above zero.
    np.testing.assert_array_equal(got.codes, np.array([[0, 0], [3, 2]]).repeat(16, 0))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_error_is_half_a_step(bits: int, axis: str):
    x = np.random.default_rng(3).normal(1.0, 2.0, (128, 64)).astype(np.float32)
    got = round_trip(x, bits=bits, group_size=32, axis=axis, metadata_dtype="float16")
    shape = (4, 32, 64) if axis == "tokens" else (128, 2, 32)
    reduced = 1 if axis == "tokens" else 2
    scale = np.expand_dims(np.asarray(got.packed.scale, np.float32), reduced)
    error = np.abs(np.asarray(got.values) - x).reshape(shape)
    # Beside half a step: zero and `levels * scale` are off by half an ulp of float16 (2**-11) of values below 16.
    assert (error <= scale / 2 + 2 * 2.0**-11 * 16).all()
    assert error.max() > 0.4 * scale.max()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_bits(bits: int):
    tokens, channels = 128, 64
    x = jax.ShapeDtypeStruct((2, 3, tokens, channels), jnp.float32)
    heads = 2 * 3
    for metadata_dtype, size in (("float16", 2), ("bfloat16", 2), ("float8_e4m3fn", 1)):
        packing = Packing(bits, 32, "channels", metadata_dtype, factor_block=64)
        got = jax.eval_shape(functools.partial(encode_minmax, packing=packing), x)
        factors = heads * 2 * 2 * 4 if size == 1 else 0
        assert (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(got))
            == heads * tokens * channels * bits // 8 + heads * 2 * tokens * channels // 32 * size + factors
        )
        assert got.num_tokens == tokens


@pytest.mark.parametrize(("metadata_dtype", "axis"), [("float16", "channels"), ("float8_e4m3fn", "tokens")])
def test_packing_blocks_are_independent(metadata_dtype: str, axis: str):
    """Slices, writes and padding at packing blocks agree with quantising the blocks alone."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 96, 32)), jnp.float32)
    arguments = {"bits": 3, "group_size": 16, "axis": axis, "metadata_dtype": metadata_dtype, "factor_block": 32}
    whole, block = round_trip(x, **arguments).packed, round_trip(x[:, :, 32:64], **arguments).packed
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(whole.tokens(32, 32), block)
    same(whole.tokens(jnp.int32(32), 32), block)
    padded = whole.pad_tokens(160)
    assert padded.num_tokens == 160
    same(padded.tokens(0, 96), whole)

    written = whole.write(block, jnp.array([64, 0]), jnp.array([True, False]))
    first, second = (jax.tree.map(lambda leaf, b=b: leaf[b], written) for b in (0, 1))
    same(first.tokens(64, 32), jax.tree.map(lambda leaf: leaf[0], block))
    same(first.tokens(0, 64), jax.tree.map(lambda leaf: leaf[0], whole.tokens(0, 64)))
    same(second, jax.tree.map(lambda leaf: leaf[1], whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 0}, "bits=0"),
        ({"group_size": 24}, "group_size=24"),
        ({"axis": "heads"}, "axis='heads'"),
        ({"metadata_dtype": "float64"}, "metadata_dtype='float64'"),
        ({"tokens": 40}, "40 tokens"),
        ({"tokens": 1}, "1 tokens"),
        ({"tokens": 16, "bits": 1}, "16 tokens"),
        ({"tokens": 24, "axis": "channels"}, "24 tokens"),
        ({"channels": 40, "axis": "channels"}, "head_dim 40 .* group_size 16"),
    ],
)
def test_wrong_input_is_named(change: dict, message: str):
    arguments = {"tokens": 32, "channels": 32, "bits": 2, "group_size": 16, "axis": "tokens"} | change
    x = jnp.zeros((1, 1, arguments.pop("tokens"), arguments.pop("channels")))
    with pytest.raises(ValueError, match=message):
        encode_minmax(x, Packing(**arguments))
