"""Checks decode kernels against float64 attention over the dequantised cache, within twice XLA's error."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracle import layout
from oracle.attention import attention, attention_in, relative_error
from oracle.layout import DTYPES, packing_block

# Bound, in multiples of XLA's error over the dequantised cache in the same dtype: both round weights and results to 16
# bits, in different orders.
FACTOR = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and configuration, with random ragged lengths unless given."""

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


def random_case(
    rng: np.random.Generator,
    head_dims: list[int],
    metadata: list[str],
    most_packed: int,
    bits: tuple[int, ...] = (2, 4),
) -> Case:
    """Draws a case that a kernel supports, with at most about `most_packed` packed tokens."""
    head_dim = int(rng.choice(head_dims))
    group_size = int(rng.choice([g for g in (16, 32, 64, 128) if head_dim % g == 0]))
    k_bits, v_bits = (int(b) for b in rng.choice(bits, 2))
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


class Inputs(NamedTuple):
    """Array arguments of a package's `decode_attention`, with the package's own regions."""

    q: Any
    packed: Any
    tail: Any


def make(package: Any, case: Case, seed: int) -> tuple[Inputs, np.ndarray, float]:
    """Makes inputs (NaN beyond the lengths), the expected output and the error bound."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]
    block = max(packing_block(b, case.group_size) for b in (case.k_bits, case.v_bits))
    shape = (case.batch, case.kv_heads)
    spread = np.exp(rng.normal(size=(*shape, 1, case.head_dim)))  # channels of different size, as keys have
    k = (rng.normal(size=(*shape, case.packed, case.head_dim)) * spread).astype(dtype)
    v = rng.normal(size=(*shape, case.packed, case.head_dim)).astype(dtype)
    k[:, :, : case.packed // 4, 0] = 1.0  # constant groups
    v[:, 0, :, : case.group_size] = -0.5
    tail_k = (rng.normal(size=(*shape, case.tail, case.head_dim)) * spread).astype(dtype)
    tail_v = rng.normal(size=(*shape, case.tail, case.head_dim)).astype(dtype)
    q = rng.normal(size=(case.batch, case.kv_heads * case.group, case.head_dim)).astype(dtype)
    packed_k = layout.quantize(k, case.k_bits, case.group_size, "tokens", case.metadata, block)
    packed_v = layout.quantize(v, case.v_bits, case.group_size, "channels", case.metadata, block)
    if case.lengths is None:
        lengths = [
            (int(rng.integers(0, case.packed // block + 1)) * block, int(rng.integers(0, case.tail + 1)))
            for _ in range(case.batch)
        ]
    else:
        lengths = list(case.lengths)

    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    dense_k, dense_v = packed_k.dequantize(), packed_v.dequantize()
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

    def stored(x: layout.Packed) -> Any:
        arrays = [poison(a, case.packed // a.shape[2]) if a.shape[2] else a for a in x.arrays]
        planes = len(layout.PLANES[x.bits])
        scale, zero, *factors = arrays[planes:]
        return package.Packed(tuple(arrays[:planes]), scale, zero, tuple(factors) or None)

    for b, (_, n_tail) in enumerate(lengths):
        tail_k[b, :, n_tail:] = np.nan
        tail_v[b, :, n_tail:] = np.nan
    packed_length, tail_length = np.array(lengths, np.int32).T
    packed = package.Region(stored(packed_k), stored(packed_v), packed_length)
    inputs = Inputs(q, packed, package.Region(tail_k, tail_v, tail_length))
    return inputs, expected, FACTOR * relative_error(rounded, expected)


def options(package: Any, case: Case) -> dict[str, Any]:
    """Settings of a package's `decode_attention`."""
    storage = package.Storage(case.k_bits, case.v_bits, case.group_size)
    return {"storage": storage, "scale": case.head_dim**-0.5 if case.scale is None else case.scale}


def check(package: Any, case: Case, seed: int) -> None:
    """Checks that the error is within its bound and that a second run is bit-equal."""
    inputs, expected, bound = make(package, case, seed)
    arrays = jax.tree.map(jnp.asarray, inputs)
    settings = options(package, case) | {"config": case.config}
    first, second = (np.asarray(package.decode_attention(*arrays, **settings)) for _ in range(2))
    assert first.shape == expected.shape
    assert first.dtype == DTYPES[case.dtype]
    error = relative_error(first, expected)
    assert error <= bound, f"relative error {error}, bound {bound}"
    assert np.array_equal(first, second), "second run differs"


def abstract(package: Any, case: Case) -> Inputs:
    """Shapes and dtypes of the inputs."""
    small, _, _ = make(package, dataclasses.replace(case, lengths=((0, 0),) * case.batch), 0)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)


def refusal_arguments(package: Any, change: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `decode_attention` for a plain case with one change: of `q`, of `scale`, of a field of `Storage`, or
    of an array of the tail ("tail_k", "tail_v").
    """
    case, (name, value) = Case(), next(iter(change.items()))
    arguments = abstract(package, case)._asdict() | options(package, case)
    if name in ("k_bits", "v_bits", "group_size"):
        value, name = dataclasses.replace(arguments["storage"], **change), "storage"
    elif name.startswith("tail_"):
        value, name = arguments["tail"]._replace(**{name.removeprefix("tail_"): value}), "tail"
    return arguments | {name: value}
