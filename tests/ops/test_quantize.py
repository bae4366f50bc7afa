"""Tests quantize: "xla" against the definition, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import normal

from minikv_jax.cache.spec import LayerSpec, Packed
from minikv_jax.methods.base import Kind
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.turboquant import TurboQuant
from minikv_jax.ops.quantize import quantize, store
from minikv_jax.packing import Packing, QuantizedArray, StoredArray, encode_minmax

X = jnp.asarray(normal(np.random.default_rng(0), 2, 2, 64, 32))


@pytest.mark.parametrize("packing", [Packing(2, 16, "tokens"), Packing(3, 32, "channels", "float8_e4m3fn")], ids=str)
def test_quantize_is_the_definition(packing: Packing):
    run = jax.jit(quantize, static_argnames=("packing", "implementation"))
    by_name, by_default = (run(X, packing=packing, implementation=name) for name in ("xla", None))
    definition = jax.jit(encode_minmax, static_argnames="packing")(X, packing=packing)
    jax.tree.map(np.testing.assert_array_equal, by_name, definition)
    if jax.default_backend() != "gpu":
        jax.tree.map(np.testing.assert_array_equal, by_default, by_name)


def test_store_packs_as_the_method_does():
    """Kernels may pack only min/max codes; a quantizer with another layout packs in plain JAX."""

    def stored(kind: Kind, spec: LayerSpec) -> Packed:
        return jax.eval_shape(lambda x: store(x, kind, spec), X)

    minmax, own = (LayerSpec(Method(quantizer=quantizer)) for quantizer in (MinMax(v_bits=4), TurboQuant()))
    keys, values = stored("keys", minmax), stored("values", minmax)
    assert isinstance(keys, QuantizedArray)
    assert isinstance(values, QuantizedArray)
    assert keys.packing == Packing(2, 16, "tokens", factor_block=16)
    assert values.packing == Packing(4, 16, "channels", factor_block=16)
    assert isinstance(stored("keys", own), StoredArray)
    assert stored("keys", own).num_tokens == 64
    with pytest.raises(NotImplementedError, match="quantize: TurboQuant has no 'cuda' kernel; implementation='xla'"):
        store(X, "keys", own, "cuda")


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="48 tokens do not fill whole groups and words: expected a multiple of 32"):
        quantize(X[:, :, :48], Packing(2, 32, "tokens"))
    with pytest.raises(ValueError, match="head_dim 32 is not divisible by group_size 64"):
        quantize(X, Packing(2, 64, "channels"))
    with pytest.raises(ValueError, match=r"implementation='triton'.*xla"):
        quantize(X, Packing(2, 16, "tokens"), implementation="triton")
