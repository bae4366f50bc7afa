"""What every decode kernel is held to: float64 attention over the dequantised cache, within twice XLA's error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle.cuda_ffi_reference import (
    DTYPES,
    attention,
    attention_in,
    dequantize,
    packing_block,
    quantize,
    relative_error,
)

# Of the error that XLA makes over the dequantised cache in the same dtype: both round weights and results to 16
# bits, in another order.
FACTOR = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and configuration; lengths are drawn, ragged, unless given."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    packed: int = 512
    tail: int = 96
    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 16
    metadata: str = "float16"
    dtype: str = "bfloat16"
    lengths: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    config: Any = None


CASES = {
    "defaults": Case(),
    "bfloat16 metadata": Case(metadata="bfloat16"),
    "4 bits": Case(k_bits=4, v_bits=4, group_size=32),
    "keys 2, values 4": Case(k_bits=2, v_bits=4),
    "keys 4, values 2": Case(k_bits=4, v_bits=2),
    "groups of 32": Case(group_size=32),
    "groups of 64": Case(group_size=64, metadata="bfloat16"),
    "groups of 128": Case(group_size=128),
    "head_dim 64": Case(head_dim=64),
    "one query head": Case(group=1),
    "three query heads": Case(group=3),
    "eight query heads": Case(group=8),
    "sixteen query heads": Case(group=16),
    "nothing packed": Case(packed=0, lengths=((0, 96), (0, 5))),
    "no tail": Case(tail=0, lengths=((512, 0), (48, 0))),
    "empty tail": Case(lengths=((512, 0), (16, 0))),
    "an empty row": Case(lengths=((0, 0), (160, 3))),
    "all rows empty": Case(lengths=((0, 0), (0, 0))),
    "many short rows": Case(batch=70, kv_heads=8, packed=64, tail=8),
    "one long row": Case(batch=1, kv_heads=1, packed=40960, tail=130, lengths=((40944, 129),)),
    "long rows": Case(batch=3, kv_heads=2, packed=16384, tail=64, lengths=((16384, 64), (8192, 1), (16, 33))),
    "given scale": Case(scale=0.3),
    "capacity below a tile": Case(packed=16, lengths=((16, 1), (0, 96))),
}


def random_case(rng: np.random.Generator, head_dims: list[int], metadata: list[str], most_packed: int) -> Case:
    """A case of what a kernel takes, with at most about `most_packed` packed tokens."""
    head_dim = int(rng.choice(head_dims))
    group_size = int(rng.choice([g for g in (16, 32, 64, 128) if head_dim % g == 0]))
    k_bits, v_bits = (int(b) for b in rng.choice([2, 4], 2))
    block = max(packing_block(b, group_size) for b in (k_bits, v_bits))
    return Case(
        batch=int(rng.integers(1, 6)),
        kv_heads=int(rng.integers(1, 5)),
        group=int(rng.integers(1, 17)),
        head_dim=head_dim,
        packed=int(rng.integers(1, most_packed // block)) * block,
        tail=int(rng.integers(1, 200)),
        k_bits=k_bits,
        v_bits=v_bits,
        group_size=group_size,
        metadata=str(rng.choice(metadata)),
    )


def make(case: Case, seed: int) -> tuple[dict, np.ndarray, float]:
    """Arguments of `decode_attention` (NaN where the lengths do not reach), the expected output and the error bound."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    block = max(packing_block(b, case.group_size) for b in (case.k_bits, case.v_bits))
    shape = (case.batch, case.kv_heads)
    spread = np.exp(rng.normal(size=(*shape, 1, case.head_dim)))  # channels of different size, as keys have
    k = (rng.normal(size=(*shape, case.packed, case.head_dim)) * spread).astype(dtype)
    v = rng.normal(size=(*shape, case.packed, case.head_dim)).astype(dtype)
    k[:, :, : case.packed // 4, 0] = 1.0  # groups without range
    v[:, 0, :, : case.group_size] = -0.5
    tail_k = (rng.normal(size=(*shape, case.tail, case.head_dim)) * spread).astype(dtype)
    tail_v = rng.normal(size=(*shape, case.tail, case.head_dim)).astype(dtype)
    q = rng.normal(size=(case.batch, case.kv_heads * case.group, case.head_dim)).astype(dtype)
    packed_k = quantize(k, case.k_bits, case.group_size, "tokens", case.metadata, block)
    packed_v = quantize(v, case.v_bits, case.group_size, "channels", case.metadata, block)
    if case.lengths is None:
        lengths = [
            (int(rng.integers(0, case.packed // block + 1)) * block, int(rng.integers(0, case.tail + 1)))
            for _ in range(case.batch)
        ]
    else:
        lengths = list(case.lengths)

    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    dense_k, dense_v = dequantize(packed_k), dequantize(packed_v)
    expected, rounded = np.zeros(q.shape), np.zeros(q.shape)
    for b, (n_packed, n_tail) in enumerate(lengths):
        for h in range(case.kv_heads):
            keys = np.concatenate([dense_k[b, h, :n_packed], tail_k[b, h, :n_tail].astype(np.float32)])
            values = np.concatenate([dense_v[b, h, :n_packed], tail_v[b, h, :n_tail].astype(np.float32)])
            heads = slice(h * case.group, (h + 1) * case.group)
            expected[b, heads] = attention(q[b, heads].astype(np.float32), keys, values, scale)
            rounded[b, heads] = attention_in(dtype, q[b, heads], keys, values, scale)

    def poison(x: np.ndarray, ratio: int) -> np.ndarray:
        x = x.copy()
        bad = np.iinfo(np.uint32).max if x.dtype == np.uint32 else np.nan
        for b, (n_packed, _) in enumerate(lengths):
            x[b, :, n_packed // ratio :] = bad
        return x

    def arrays(x) -> list[np.ndarray]:
        return [poison(a, case.packed // a.shape[2]) if a.shape[2] else a for a in x.arrays]

    for b, (_, n_tail) in enumerate(lengths):
        tail_k[b, :, n_tail:] = np.nan
        tail_v[b, :, n_tail:] = np.nan
    k_words, k_scale, k_zero, *k_factors = arrays(packed_k)
    v_words, v_scale, v_zero, *v_factors = arrays(packed_v)
    arguments = {
        "q": q,
        "k_planes": (k_words,),
        "k_scale": k_scale,
        "k_zero": k_zero,
        "v_planes": (v_words,),
        "v_scale": v_scale,
        "v_zero": v_zero,
        "tail_k": tail_k,
        "tail_v": tail_v,
        "packed_length": np.array([n for n, _ in lengths], np.int32),
        "tail_length": np.array([n for _, n in lengths], np.int32),
        "k_factors": tuple(k_factors) or None,
        "v_factors": tuple(v_factors) or None,
    }
    return arguments, expected, FACTOR * relative_error(rounded, expected)


def check(kernel: Callable[..., jax.Array], case: Case, seed: int) -> None:
    """The error is within its bound, and a second run is bit-equal."""
    arguments, expected, bound = make(case, seed)
    options = {
        "k_bits": case.k_bits,
        "v_bits": case.v_bits,
        "group_size": case.group_size,
        "scale": case.head_dim**-0.5 if case.scale is None else case.scale,
        "config": case.config,
    }
    first, second = (np.asarray(kernel(**jax.tree.map(jnp.asarray, arguments), **options)) for _ in range(2))
    assert first.shape == expected.shape
    assert first.dtype == DTYPES[case.dtype]
    error = relative_error(first, expected)
    assert error <= bound, f"relative error {error}, bound {bound}"
    assert np.array_equal(first, second), "second run differs"


def abstract(case: Case) -> dict:
    """The arguments' shapes alone."""
    small, _, _ = make(dataclasses.replace(case, lengths=((0, 0),) * case.batch), 0)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
