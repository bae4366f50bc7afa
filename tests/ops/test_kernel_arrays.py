"""Tests the conversion of a layer's cache to the kernel packages' arrays and back."""

import dataclasses

import jax
import numpy as np
import pytest
from support.layers import cache_of, normal

from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.turboquant import TurboQuant
from minikv_jax.ops import kernel_arrays

H = 32
TAIL = Tail(length=32)
FLOAT8 = MinMax(k_bits=4, v_bits=2, group_size=32, metadata_dtype="float8_e4m3fn")

pytestmark = pytest.mark.parametrize("package", ["pallas", "cuda"])


def layer_of(method: Method) -> LayerCache:
    k, v = normal(np.random.default_rng(0), 2, 2, 80, 2, H)
    return cache_of(method, k, v, np.array([80, 33]), 9)


@pytest.mark.parametrize("quantizer", [MinMax(), FLOAT8], ids=["float16", "float8"])
def test_there_and_back(package: str, quantizer: MinMax):
    """The arrays are the layer's own under the package's names; converted back, they are the same layer."""
    layer = layer_of(Method(quantizer=quantizer, tail=TAIL))
    packed, tail, storage = kernel_arrays.regions(layer, package)
    assert dataclasses.astuple(storage) == (quantizer.k_bits, quantizer.v_bits, quantizer.group_size)
    assert (packed.k.factors is None) == (quantizer is not FLOAT8)
    assert packed.length is layer.packed.length
    assert tail.k is layer.tail.k
    again = kernel_arrays.updated(layer, packed, tail)
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    assert all(old is new for old, new in zip(jax.tree.leaves(layer), jax.tree.leaves(again), strict=True))


def test_an_unquantised_layer_has_a_packed_region_without_tokens(package: str):
    layer = layer_of(Method())
    packed, tail, _ = kernel_arrays.regions(layer, package)
    assert {leaf.shape[2] for leaf in jax.tree.leaves((packed.k, packed.v))} == {0}
    assert packed.length.tolist() == [0, 0]
    assert tail.v is layer.tail.v


def test_what_no_kernel_knows_is_refused(package: str):
    layer = layer_of(Method(quantizer=MinMax(), tail=TAIL))
    windowed = dataclasses.replace(layer, spec=LayerSpec(layer.method, window=8))
    with pytest.raises(NotImplementedError, match="window=8: the kernels keep no positions"):
        kernel_arrays.regions(windowed, package)
    own = dataclasses.replace(layer, spec=LayerSpec(Method(quantizer=TurboQuant())))
    with pytest.raises(NotImplementedError, match="TurboQuant: the kernels read min/max codes only"):
        kernel_arrays.regions(own, package)
