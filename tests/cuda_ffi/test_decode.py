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


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_attention_over_the_dequantised_cache(name: str) -> None:
    check(cuda_ffi, CASES[name], seed=len(name))


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    case = decode_checks.random_case(rng, [64, 96, 128, 256], ["float16", "bfloat16", "float8_e4m3fn"], 2048)
    if seed % 3 == 0:
        return case  # the kernel chooses, and may have several warps share a tile
    return dataclasses.replace(case, config=Config(warps=int(rng.integers(1, 9)), stages=int(rng.integers(2, 5))))


@pytest.mark.gpu
@pytest.mark.parametrize("first_seed", range(0, 500, 25))
def test_random_cases(first_seed: int) -> None:
    failures = []
    for seed in range(first_seed, first_seed + 25):
        try:
            check(cuda_ffi, random_case(seed), seed)
        except AssertionError as error:
            failures.append(f"seed {seed}, {random_case(seed)}: {error}")
    assert not failures, "\n".join(failures)


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
        ({"k_bits": 3}, "k_bits=3"),
        ({"v_bits": 8}, "v_bits=8"),
        ({"group_size": 8}, "group_size=8"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 128), np.float32)}, "q.dtype=float32"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 128), np.float16)}, "q.dtype=float16"),
        ({"q": jax.ShapeDtypeStruct((2, 8, 80), jnp.bfloat16)}, "head_dim=80"),
    ],
)
def test_unsupported_cases_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        cuda_ffi.decode_attention(**refusal_arguments(cuda_ffi, change))


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
