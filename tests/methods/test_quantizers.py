"""Tests quantizers besides min/max against their papers, and rotations through the cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import layout, naive, naive_methods
from support.layers import assert_close, cache_of, normal
from support.tiny import tiny_config

from minikv_jax.cache import memory
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec, Packed
from minikv_jax.methods.base import Kind, Quantizer
from minikv_jax.methods.fp8 import FP8
from minikv_jax.methods.hqq import HQQ
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.nvfp4 import NVFP4
from minikv_jax.methods.quarot import Hadamard, hadamard
from minikv_jax.methods.rtn import RTN
from minikv_jax.methods.turboquant import TurboQuant, lloyd_max
from minikv_jax.ops.append import append
from minikv_jax.ops.decode_attention import decode_attention
from minikv_jax.ops.extend_attention import extend_attention
from minikv_jax.packing import QuantizedArray

B, K, S, H, BLOCK = 2, 2, 64, 32, 32


def method_of(quantizer: Quantizer) -> Method:
    return Method(quantizer=quantizer, tail=Tail(length=64))


@functools.partial(jax.jit, static_argnames=("quantizer", "kind"))
def round_trip(x: np.ndarray, quantizer: Quantizer, kind: Kind) -> tuple[Packed, jax.Array]:
    spec = LayerSpec(method_of(quantizer))
    packed = spec.encode(jnp.asarray(x), kind)
    return packed, spec.decode(packed, kind, jnp.float32)


def sample(seed: int = 0, head_dim: int = H) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(B, K, S, head_dim)).astype(np.float32)
    x[0, 0, 3] = 0  # a token without a direction
    return x * np.logspace(-1, 1, head_dim, dtype=np.float32)


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize(
    "quantizer",
    [
        RTN(k_bits=2, v_bits=2, group_size=16),
        RTN(k_bits=4, v_bits=4, group_size=32),
        NVFP4(),
        FP8(format="e4m3"),
        FP8(format="e5m2"),
    ],
    ids=["rtn-2", "rtn-4", "nvfp4", "fp8-e4m3", "fp8-e5m2"],
)
def test_matches_naive(quantizer: Quantizer, kind: Kind):
    x = sample() * np.float32(100 if isinstance(quantizer, FP8) else 1)  # some saturate
    x[0, 0, 3] = x[0, 0, 2]
    got = np.asarray(round_trip(x, quantizer, kind)[1])
    for b, head, block in np.ndindex(B, K, S // BLOCK):
        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
        part = x[b, head, tokens]
        if isinstance(quantizer, RTN):
            packing = quantizer.k_bits, quantizer.group_size, "channels", "float16"
            want = layout.quantize(part, *packing).dequantize()
        elif isinstance(quantizer, FP8):
            want = naive_methods.fp8(part, quantizer.format)
        else:
            want = naive_methods.nvfp4(part)
        np.testing.assert_allclose(got[b, head, tokens], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "axis"), [("keys", "tokens"), ("values", "channels")])
def test_hqq(kind: Kind, axis: str):
    """The error is the reference solver's and below min/max, in the layout that kernels read."""
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, size=(B, K, S, H)).astype(np.float32)
    errors = {}
    for quantizer in (HQQ(), MinMax()):
        packed, values = round_trip(x, quantizer, kind)
        assert isinstance(packed, QuantizedArray)
        gap = np.abs(np.asarray(values) - x)
        errors[type(quantizer)] = gap.mean()
        if type(quantizer) is MinMax:
            continue
        for b, head in np.ndindex(B, K):
            got = (gap[b, head].T if axis == "tokens" else gap[b, head]).reshape(-1, 16).mean(axis=-1)
            want = naive_methods.hqq(x[b, head], 2, 16, axis)
            # Scale and zero are stored in float16: 2**-11 of values up to 30 here, mostly below 3. A code at a tie may
            # round the other way, which changes its group's solution.
            assert np.isclose(got, want, rtol=1e-2, atol=2e-3).mean() > 0.98
            np.testing.assert_allclose(got, want, rtol=0.1, atol=2e-2)
    assert errors[HQQ] < errors[MinMax]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant(bits: int):
    """Codes are the nearest levels, with the paper's distortion for unit vectors (theorem 1: 0.36, 0.117, ...)."""
    head_dim = 128
    quantizer = TurboQuant(k_bits=bits, v_bits=bits, metadata_dtype="bfloat16")
    x = sample(2, head_dim)
    got = np.asarray(round_trip(x, quantizer, "keys")[1])
    levels = lloyd_max(head_dim, bits)
    want = naive_methods.turboquant(x[1, 0], levels, ml_dtypes.bfloat16)
    np.testing.assert_allclose(got[1, 0], want, rtol=1e-5, atol=1e-6)
    assert not got[0, 0, 3].any()
    unit = np.random.default_rng(3).normal(size=(1, 1, 4096, head_dim)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    error = np.sum((np.asarray(round_trip(unit, quantizer, "keys")[1]) - unit) ** 2, axis=-1).mean()
    assert error == pytest.approx({1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}[bits], rel=0.16 if bits == 3 else 0.06)


def test_lloyd_max_tends_to_the_normal_codebook():
    """The levels tend to those for a unit normal (Max 1960, table 1)."""
    np.testing.assert_allclose(lloyd_max(4096, 1) * 64, [-0.7979, 0.7979], atol=2e-3)
    np.testing.assert_allclose(lloyd_max(4096, 2) * 64, [-1.510, -0.4528, 0.4528, 1.510], atol=2e-3)


@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_hadamard_is_orthogonal_and_flat(size: int):
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    assert len(np.unique(np.abs(matrix[matrix != 0]).round(6))) == 1


@pytest.mark.parametrize("kind", [Hadamard, TurboQuant])
def test_rotation_goes_through_the_cache(kind: type[Quantizer]):
    """Attention over a rotated cache equals attention over the tokens rotated back; the tail is exact."""
    method = method_of(kind(k_bits=3, v_bits=3))
    lengths = np.array([64 + 21, 64, 9])
    rng = np.random.default_rng(4)
    k, v, q = normal(rng, 3, 85, K, H), normal(rng, 3, 85, K, H), normal(rng, 3, 4, H)
    layer = cache_of(method, k, v, lengths)
    rotation = np.asarray(layer.spec.to_basis(jnp.eye(H), "keys"))
    assert np.abs(rotation - np.eye(H)).max() > 0.1
    out = jax.jit(decode_attention)(q, layer)
    stored = [np.asarray(x) @ rotation.T for x in layer.packed_tokens(0, layer.packed.capacity, jnp.float32)]
    new_q, new_k, new_v = normal(rng, 3, 2, 4, H), normal(rng, 3, 2, K, H), normal(rng, 3, 2, K, H)
    more = jax.jit(extend_attention)(new_q, new_k, new_v, layer, np.full(3, 2))
    for b, head in np.ndindex(3, K):
        packed = int(layer.packed.length[b])
        keys, values = (
            np.concatenate([old[b, head, :packed], x[b, packed : lengths[b], head]])
            for old, x in zip(stored, (k, v), strict=True)
        )
        assert packed == 64 * (lengths[b] > 60)
        for n in range(2 * head, 2 * head + 2):
            assert_close(out[b, n], naive.attend(q[b, n], keys, values), 2e-5)
            for t in range(2):
                seen_keys, seen_values = (
                    np.concatenate([old, new[b, : t + 1, head]]) for old, new in ((keys, new_k), (values, new_v))
                )
                assert_close(more[b, t, n], naive.attend(new_q[b, t, n], seen_keys, seen_values), 2e-5)
    assert isinstance(layer.packed.k, QuantizedArray) == (kind is Hadamard)  # which the kernels read


@pytest.mark.parametrize(
    ("quantizer", "per_value"),
    [
        (RTN(k_bits=4, v_bits=4), 4 + 2 * 16 / 16),
        (HQQ(k_bits=4, v_bits=4), 4 + 2 * 16 / 16),
        (Hadamard(), 2 + 2 * 16 / 16),
        (TurboQuant(k_bits=3, v_bits=3), 3 + 16 / H),
        (NVFP4(), 4 + 8 / 16 + 32 / (32 * H)),
        (FP8(), 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Quantizer) else "",
)
def test_bytes_are_counted(quantizer: Quantizer, per_value: float):
    """Reported bytes equal allocated bytes and the format's bits per value on paper."""
    method = method_of(quantizer)
    model = tiny_config(head_dim=H, num_hidden_layers=1, max_position_embeddings=256)
    report = memory.report(model, method, prompt_length=S, max_new_tokens=64, batch=B, dtype="float32")
    x = np.zeros((B, S, K, H), np.float32)
    layer = cache_of(method, x, x, np.full(B, S), 64)
    assert KVCache((layer,), jnp.full(B, S)).nbytes == report.bytes
    assert layer.packed.nbytes * 8 == per_value * 2 * B * K * layer.packed.capacity * H


@pytest.mark.parametrize("quantizer", [HQQ(), RTN(), TurboQuant(), FP8()], ids=lambda value: type(value).__name__)
def test_no_kernel_packs_by_another_rule(quantizer: Quantizer):
    """A kernel that packs a full tail must not replace a quantizer with another rule."""
    x = np.zeros((B, S, K, H), np.float32)
    layer = cache_of(method_of(quantizer), x, x, np.full(B, S), 64)
    new, lengths = jnp.zeros((B, 1, K, H)), jnp.ones(B, jnp.int32)
    with pytest.raises(NotImplementedError, match=f"min/max, not {type(quantizer).__name__}"):
        append(layer, new, new, lengths, lengths[:, None], "cuda")


def test_which_kernels_a_quantizer_claims():
    """Kernels may pack min/max codes with any rotation, and may read the plain layout."""
    kinds = (MinMax, Hadamard, HQQ, RTN, TurboQuant, NVFP4, FP8)
    assert [kind.__name__ for kind in kinds if kind.kernel_packs] == ["MinMax", "Hadamard"]
    assert [kind.__name__ for kind in kinds if kind.kernel_reads] == ["MinMax", "Hadamard", "HQQ"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TurboQuant(metadata_dtype="float8_e4m3fn"), "metadata_dtype='float8_e4m3fn': .* float16, bfloat16"),
        (lambda: TurboQuant(k_bits=8), "k_bits=8: expected one of 1, 2, 3, 4"),
        (lambda: TurboQuant(seed=1.0), "seed=1.0: expected an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: FP8(format="e3m4"), "format='e3m4': expected one of e4m3, e5m2"),
        (lambda: FP8(k_bits=4), "k_bits=4: expected one of 8"),
        (lambda: NVFP4(v_bits=2), "v_bits=2: expected one of 4"),
        (lambda: HQQ(iterations=-1), "iterations=-1: expected an integer in 0..1000"),
    ],
)
def test_a_setting_that_a_quantizer_cannot_have_is_named(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
