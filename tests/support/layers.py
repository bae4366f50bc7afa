"""Builds layers for several test files, and compares them with the naive reference."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from oracle import naive

from minikv_jax.cache.capacity import LayerCapacity, layer_capacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache, Region
from minikv_jax.methods.method import Method
from minikv_jax.ops.compress import compress
from minikv_jax.ops.select import Kept
from minikv_jax.packing import QuantizedArray, unpack


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def poison(lengths: np.ndarray, *arrays: np.ndarray) -> None:
    """Writes NaN behind each row's length, in place."""
    for x in arrays:
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan


def assert_close(got: Any, want: np.ndarray, tolerance: float = 1e-5) -> None:
    """Checks equality within float32's error of attention over unit normal numbers.

    A logit of size L has an error of about L * sqrt(H) * 2**-24, which becomes a relative error of the softmax weights.
    For L < 6 it stays under 1e-5, for column sums and for outputs near zero.
    """
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def all_kept(lengths: np.ndarray, heads: int, tokens: int) -> Kept:
    positions = np.where(np.arange(tokens) < lengths[:, None, None], np.arange(tokens), tokens)
    return Kept(jnp.asarray(np.broadcast_to(positions, (len(lengths), heads, tokens))), jnp.asarray(lengths))


def cache_of(method: Method, k: np.ndarray, v: np.ndarray, lengths: np.ndarray, new_tokens: int = 0) -> LayerCache:
    """Makes a layer that keeps the whole prompt and has room for `new_tokens`."""
    capacity = layer_capacity(method, method.heavy, k.shape[1], new_tokens)
    return compressed(k, v, all_kept(lengths, k.shape[2], k.shape[1]), capacity, LayerSpec(method))


@functools.partial(jax.jit, static_argnames=("capacity", "spec"))
def compressed(k: jax.Array, v: jax.Array, kept: Kept, capacity: LayerCapacity, spec: LayerSpec) -> LayerCache:
    """Runs `compress` as a compiled program, one per method and set of shapes."""
    return compress(k, v, kept, capacity, spec)


@jax.jit
def with_garbage(layer: LayerCache) -> LayerCache:
    """Fills unused slots with NaN, and unused code words with ones."""

    def spoil(leaf: jax.Array, valid: jax.Array, capacity: int) -> jax.Array:
        rows = valid * leaf.shape[2] // max(capacity, 1)
        unused = (jnp.arange(leaf.shape[2]) >= rows[:, None])[:, None, :, None]
        garbage = jnp.uint32(2**32 - 1) if leaf.dtype == jnp.uint32 else jnp.asarray(jnp.nan, leaf.dtype)
        return jnp.where(unused, garbage, leaf)

    def spoil_region(region: Region) -> Region:
        k, v = (jax.tree.map(lambda leaf: spoil(leaf, region.length, region.capacity), x) for x in (region.k, region.v))
        return dataclasses.replace(region, k=k, v=v)

    return dataclasses.replace(layer, packed=spoil_region(layer.packed), tail=spoil_region(layer.tail))


Rows = list[list[naive.HeadCache]]


def naive_rows(method: Method, k: np.ndarray, v: np.ndarray, lengths: Sequence[int]) -> Rows:
    return [
        [naive.HeadCache.compress(method, k[b, :n, h], v[b, :n, h], range(n)) for h in range(k.shape[2])]
        for b, n in enumerate(lengths)
    ]


def naive_append(rows: Rows, k: np.ndarray, v: np.ndarray, counts: np.ndarray) -> None:
    """Appends the first `counts[b]` tokens of k and v `[B, T, K, H]`."""
    for b, row in enumerate(rows):
        for h, head in enumerate(row):
            for t in range(counts[b]):
                head.append(k[b, t, h], v[b, t, h])


def stored(rows: Rows) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the keys and values of each row and KV head."""
    return [[(head.keys(), head.values()) for head in row] for row in rows]


@jax.jit
def plain(x: QuantizedArray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns codes, and scales and zeros in float32."""

    def restore(leaf: jax.Array, factor: jax.Array | None) -> jax.Array:
        leaf = leaf.astype(jnp.float32)
        return leaf if factor is None else leaf * jnp.repeat(factor, leaf.shape[-2] // factor.shape[-2], axis=-2)

    return unpack(x.planes, x.packing.bits), restore(x.scale, x.scale_factor), restore(x.zero, x.zero_factor)


def assert_same(layer: LayerCache, rows: Rows) -> None:
    """Checks for the same tokens in the same slots, bit for bit (except ties, `layout.Packed.adopt`).

    In the "kivi" rule the tail holds `code * scale + zero`, which a compiler may round once or twice. The rows adopt
    the layer's numbers, which they quantise later.
    """
    assert np.asarray(layer.tail.length).tolist() == [len(row[0].tail) for row in rows]
    assert np.asarray(layer.packed.length).tolist() == [sum(len(x.codes) for x in row[0].packed_k) for row in rows]
    for tail, which in ((layer.tail.k, 0), (layer.tail.v, 1)):
        tail = np.asarray(tail)
        for b, h in np.ndindex(tail.shape[:2]):
            if tokens := [token[which] for token in rows[b][h].tail]:
                if layer.method.tail.rule == "kivi":
                    np.testing.assert_allclose(tail[b, h, : len(tokens)], tokens, rtol=0, atol=2**-20)
                    rows[b][h].adopt(which, tail[b, h])
                else:
                    np.testing.assert_array_equal(tail[b, h, : len(tokens)], tokens)
    if layer.method.quantizer is None:
        return
    for packed, name in ((layer.packed.k, "packed_k"), (layer.packed.v, "packed_v")):
        assert isinstance(packed, QuantizedArray)
        codes, scale, zero = map(np.asarray, plain(packed))
        for b, h in np.ndindex(codes.shape[:2]):
            for i, block in enumerate(getattr(rows[b][h], name)):
                want_scale, want_zero = block.scale.value, block.zero.value
                codes_i, scale_i, zero_i = (
                    x[b, h, i * size : (i + 1) * size]
                    for x, size in ((codes, len(block.codes)), (scale, len(want_scale)), (zero, len(want_zero)))
                )
                np.testing.assert_array_equal(scale_i, want_scale)
                np.testing.assert_array_equal(zero_i, want_zero)
                assert block.adopt(codes_i)
