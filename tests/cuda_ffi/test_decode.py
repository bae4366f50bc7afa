"""Tests CUDA decode attention against float64 attention over the dequantised cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.attention import attention, attention_in, relative_error
from oracle.layout import DTYPES
from support import decode_checks
from support.decode_checks import FACTOR, Case, abstract, check, options, refusal_arguments

import cuda_ffi
from cuda_ffi import registration
from cuda_ffi.decode_attention import Config

CASES = decode_checks.CASES | {
    "float8 metadata": Case(metadata="float8_e4m3fn"),
    "float8 metadata, 4 bits, groups of 64": Case(metadata="float8_e4m3fn", k_bits=4, v_bits=4, group_size=64),
    "head_dim 64, groups of 64": Case(head_dim=64, group_size=64, metadata="float8_e4m3fn"),
    "head_dim 96": Case(head_dim=96, group_size=32),
    "head_dim 96, 4 bits": Case(head_dim=96, group_size=16, k_bits=4, v_bits=4, metadata="float8_e4m3fn"),
    "head_dim 256": Case(head_dim=256),
    "head_dim 256, groups of 128": Case(head_dim=256, group_size=128, k_bits=4, v_bits=4),
    "a small block": Case(config=Config(warps=3, stages=5), packed=2048),
}


THREE_BITS = {
    "3 bits": Case(k_bits=3, v_bits=3),
    "3 bits, float8 metadata": Case(k_bits=3, v_bits=3, group_size=32, metadata="float8_e4m3fn"),
    "keys 3, values 4": Case(k_bits=3, v_bits=4, metadata="bfloat16"),
    "keys 2, values 3": Case(v_bits=3, group_size=64),
    "3 bits, head_dim 64": Case(head_dim=64, k_bits=3, v_bits=3),
    "3 bits, head_dim 96": Case(head_dim=96, group_size=32, k_bits=3, v_bits=3),
    "3 bits, head_dim 256": Case(head_dim=256, k_bits=3, v_bits=3),
    "3 bits, a long row": Case(
        batch=1, kv_heads=1, packed=40960, tail=130, k_bits=3, v_bits=3, lengths=((40928, 129),)
    ),
    "3 bits, nothing packed": Case(packed=0, k_bits=3, v_bits=3, lengths=((0, 96), (0, 5))),
}
SHORT_CACHES = {
    "one row, one query head": Case(batch=1, kv_heads=8, group=1, packed=2560, tail=128, lengths=((2304, 65),)),
    "blocks for nearly all multiprocessors": Case(
        batch=1, kv_heads=32, group=1, packed=2560, tail=128, lengths=((2304, 65),)
    ),
    "blocks for nearly all multiprocessors, float8 metadata": Case(
        batch=1, kv_heads=32, group=1, packed=2560, k_bits=4, v_bits=4, group_size=32, metadata="float8_e4m3fn"
    ),
    "one row, four query heads": Case(
        batch=1, kv_heads=8, packed=2560, tail=32, k_bits=4, v_bits=4, group_size=32, metadata="float8_e4m3fn"
    ),
    "more rows than multiprocessors": Case(batch=16, kv_heads=32, group=1, packed=256, tail=33),
    "a whole tile less than the capacity": Case(batch=1, packed=1024, lengths=((128, 0),)),
    "the last token of a tile": Case(packed=1024, lengths=((1008, 31), (1024, 33))),
}


def with_kernel(case: Case, kernel: str) -> Case:
    return dataclasses.replace(case, config=dataclasses.replace(case.config or Config(), kernel=kernel))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["short_cache", "long_cache"])
@pytest.mark.parametrize("name", CASES | SHORT_CACHES)
def test_matches_attention_over_the_dequantised_cache(name: str, kernel: str) -> None:
    check(cuda_ffi, with_kernel((CASES | SHORT_CACHES)[name], kernel), seed=len(name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", THREE_BITS)
def test_three_bits_match_attention_over_the_dequantised_cache(name: str) -> None:
    check(cuda_ffi, THREE_BITS[name], seed=len(name))


def random_case(seed: int, kernel: str) -> Case:
    rng = np.random.default_rng(seed)
    bits = (2, 3, 4) if kernel == "short_cache" else (2, 4)
    case = decode_checks.random_case(rng, [64, 96, 128, 256], ["float16", "bfloat16", "float8_e4m3fn"], 2048, bits)
    config = Config(kernel=kernel)
    if seed % 3:  # else the kernel chooses, and may have several warps share a tile
        config = Config(kernel=kernel, warps=int(rng.integers(1, 9)), stages=int(rng.integers(2, 5)))
    return dataclasses.replace(case, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["short_cache", "long_cache"])
@pytest.mark.parametrize("first_seed", range(0, 500, 25))
def test_random_cases(first_seed: int, kernel: str) -> None:
    failures = []
    for seed in range(first_seed, first_seed + 25):
        try:
            check(cuda_ffi, random_case(seed, kernel), seed)
        except AssertionError as error:
            failures.append(f"seed {seed}, {random_case(seed, kernel)}: {error}")
    assert not failures, "\n".join(failures)


def test_three_bits_lower_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "load", lambda: None)
    case = Case(k_bits=3, v_bits=4)
    run: Any = functools.partial(cuda_ffi.decode_attention, **options(cuda_ffi, case))
    lowered = jax.jit(run).trace(*abstract(cuda_ffi, case)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@minikv_decode_attention") == 1


@pytest.mark.parametrize("metadata", ["float16", "float8_e4m3fn"])
def test_decode_and_append_lower_without_a_gpu(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one call of its handler, and append returns every array of the cache in its argument's buffer."""
    monkeypatch.setattr(registration, "load", lambda: None)
    case = Case(metadata=metadata)
    inputs, settings = abstract(cuda_ffi, case), options(cuda_ffi, case)
    run: Any = functools.partial(cuda_ffi.decode_attention, **settings)
    lowered = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@minikv_decode_attention") == 1

    token, count = jax.ShapeDtypeStruct((2, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    run = functools.partial(cuda_ffi.append, storage=settings["storage"], sinks=4, block=32)
    lowered = jax.jit(run).trace(token, token, count, inputs.packed, inputs.tail).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("@minikv_append") == 1
    assert text.count("output_operand_alias<") == 2 + 14
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (inputs[1:], lowered.out_info))
    assert before == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_bits": 8}, "k_bits=8"),
        ({"v_bits": 1}, "v_bits=1"),
        ({"group_size": 8}, "group_size=8"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 128), np.float32)}, "q.dtype=float32"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 128), np.float16)}, "q.dtype=float16"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 80), jnp.bfloat16)}, "head_dim=80"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        cuda_ffi.decode_attention(**refusal_arguments(cuda_ffi, change))


@pytest.mark.parametrize(("k_bits", "v_bits", "name"), [(3, 2, "k_bits"), (4, 3, "v_bits")])
def test_the_kernel_for_long_caches_refuses_3_bits(k_bits: int, v_bits: int, name: str) -> None:
    case = Case(k_bits=k_bits, v_bits=v_bits, config=Config(kernel="long_cache"))
    message = f"{name}=3: the CUDA decode kernel for long caches supports 2, 4"
    with pytest.raises(NotImplementedError, match=message):
        cuda_ffi.decode_attention(*abstract(cuda_ffi, case), **options(cuda_ffi, case), config=case.config)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="kernel='flash': expected short_cache, long_cache or None"):
        Config(kernel="flash")


def test_each_plane_has_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "load", lambda: None)
    case = Case(k_bits=3, v_bits=3)
    inputs = abstract(cuda_ffi, case)
    high = jax.ShapeDtypeStruct((2, 2, 32, 128), np.uint32)  # as many words as the lower plane
    packed = inputs.packed._replace(v=inputs.packed.v._replace(planes=(inputs.packed.v.planes[0], high)))
    message = r"packed.v.planes\[1\] has shape \(2, 2, 32, 128\): expected \(2, 2, 16, 128\)"
    with pytest.raises(ValueError, match=message):
        cuda_ffi.decode_attention(inputs.q, packed, inputs.tail, **options(cuda_ffi, case))


def test_factors_belong_to_float8_metadata() -> None:
    case = Case(metadata="float8_e4m3fn")
    inputs, plain = abstract(cuda_ffi, case), abstract(cuda_ffi, Case())
    without = inputs.packed._replace(v=inputs.packed.v._replace(factors=None))
    with_factors = plain.packed._replace(k=plain.packed.k._replace(factors=inputs.packed.k.factors))
    for packed, message in ((without, "v has no factors with float8"), (with_factors, "k has factors with float16")):
        with pytest.raises(ValueError, match=message):
            cuda_ffi.decode_attention(inputs.q, packed, inputs.tail, **options(cuda_ffi, case))


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (4, 128), (3, 64)])
def test_unpacked_tokens_are_read_up_to_the_lengths(group: int, head_dim: int):
    rng = np.random.default_rng(3)
    dtype, kv_heads, lengths = DTYPES["bfloat16"], 2, (300, 1, 77, 0)
    q = rng.normal(size=(4, kv_heads * group, head_dim)).astype(dtype)
    k, v = (rng.normal(size=(4, kv_heads, 300, head_dim)).astype(dtype) for _ in "kv")
    expected, rounded = np.zeros(q.shape), np.zeros(q.shape)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = np.nan, np.nan
        for h in range(kv_heads if length else 0):  # a row without tokens gives zeros
            heads = slice(h * group, (h + 1) * group)
            keys, values = (x[b, h, :length].astype(np.float32) for x in (k, v))
            expected[b, heads] = attention(q[b, heads].astype(np.float32), keys, values, head_dim**-0.5)
            rounded[b, heads] = attention_in(dtype, q[b, heads], keys, values, head_dim**-0.5)
    tail = cuda_ffi.Region(jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths, jnp.int32))
    out = cuda_ffi.decode_unpacked(jnp.asarray(q), tail, scale=head_dim**-0.5)
    assert relative_error(np.asarray(out), expected) <= FACTOR * relative_error(rounded, expected)
