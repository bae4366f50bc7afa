"""Tests that compiled programs do not allocate or copy too much."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minikv_jax import programs
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.methods import lookup
from minikv_jax.methods.method import Method
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.sampling import Sampling

SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8448,
    tie_word_embeddings=True,
)


SETTINGS = programs.Settings(128, Sampling(), (), None, False)


def shapes_of_the_model(layers: int = 2) -> tuple[Any, Any]:
    """Shapes of a model with two layers, which stand for thirty equal ones."""
    config = dataclasses.replace(SMOLLM2, num_hidden_layers=layers)
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))


def inputs(batch: int, tokens: int) -> programs.Inputs:
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
    return programs.Inputs(None, ids, lengths, jax.random.key(0))


def cache_shapes(method: Method, batch: int, tokens: int) -> KVCache:
    graphdef, params = shapes_of_the_model()
    start = functools.partial(programs.start, graphdef, SETTINGS, method)
    return jax.eval_shape(start, params, *inputs(batch, tokens)).cache


@pytest.mark.parametrize(("name", "batch"), [("minikv", 1), ("full", 1), ("full", 2)])
def test_memory_of_a_long_prompt(name: str, batch: int):
    """At 8192 tokens, there is no S x S buffer and the decode loop updates one cache in place."""
    size, method = 8192, lookup.get(name)
    graphdef, params = shapes_of_the_model()

    def compiled(tokens: int) -> Any:
        return programs.run.lower(graphdef, SETTINGS, method, params, *inputs(batch, tokens)).compile()

    program = compiled(size)
    shapes = re.findall(r"= (\w+)\[([\d,]+)\]", program.as_text())
    assert max(np.prod([int(n) for n in dims.split(",")]) for _, dims in shapes) < size * size
    # The allocation besides arguments and result is the prompt's activations, which are linear in its length.
    half = compiled(size // 2).memory_analysis().temp_size_in_bytes
    assert program.memory_analysis().temp_size_in_bytes < 2.2 * half
    cache = cache_shapes(method, batch, size)
    big = {leaf.shape for leaf in jax.tree.leaves(cache) if leaf.ndim == 4 and leaf.shape[2] > 128}
    assert big
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not big & {tuple(map(int, dims.split(","))) for dims in copied}


@pytest.mark.parametrize("name", ["minikv", "full"])
def test_a_decode_step_works_in_the_cache_itself(name: str):
    """Decoding's memory does not grow with the cache, whose buffers are reused for the result."""
    graphdef, params = shapes_of_the_model()

    def program(size: int) -> tuple[Any, int]:
        start = functools.partial(programs.start, graphdef, SETTINGS, lookup.get(name))
        state = jax.eval_shape(start, params, *inputs(2, size))
        compiled = programs.decode_until.lower(graphdef, SETTINGS, params, state, np.int32(1)).compile()
        return compiled.memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))

    (long, cache), (short, _) = program(8192), program(2048)
    assert long.alias_size_in_bytes >= cache
    assert long.temp_size_in_bytes <= 1.1 * short.temp_size_in_bytes


@pytest.mark.parametrize("name", ["minikv", "twin-4bit", "h2o"])
def test_layers_share_functions(name: str):
    """Ops are in a program once, however many layers it has."""

    def functions(layers: int) -> list[str]:
        graphdef, params = shapes_of_the_model(layers)
        text = programs.run.lower(graphdef, SETTINGS, lookup.get(name), params, *inputs(1, 256)).as_text()
        return re.findall(r"func\.func private @(\w+)", text)

    few = functions(2)
    assert {"_attend", "score", "keep", "decode_layer"} <= set(few)
    assert sorted(few) == sorted(functions(4))
