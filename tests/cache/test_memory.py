"""Tests that predicted bytes equal allocated bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support.tiny import tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax.cache import memory
from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.prefill import prefill
from minikv_jax.prompts import bucket_length


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=512)


def fitting(name: str) -> mk.Method:
    """Returns a named method with groups that fit 16 channels per head."""
    method = lookup.get(name)
    if isinstance(method.quantizer, MinMax):
        return dataclasses.replace(method, quantizer=dataclasses.replace(method.quantizer, group_size=16))
    return method


@pytest.mark.parametrize("name", lookup.names())
def test_predicted_bytes_are_the_shapes(model: mk.Llama, name: str):
    """This holds for the prefill of every named method; decoding keeps the shapes."""
    method = fitting(name)
    ids, lengths = jax.ShapeDtypeStruct((2, 160), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(lambda ids, lengths: prefill(model, ids, lengths, method, 9)[1], ids, lengths)
    report = memory.report(model.config, method, prompt_length=160, max_new_tokens=9, batch=2, dtype="float32")

    def nbytes(tree: object) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert report.bytes == nbytes(cache)
    assert report.layer_bytes == tuple(nbytes(layer) for layer in cache.layers)
    assert report.packed_bytes == sum(nbytes((layer.packed.k, layer.packed.v)) for layer in cache.layers)
    regions = [(layer.packed.capacity, layer.tail.capacity) for layer in cache.layers]
    assert regions == [(layer.packed, layer.tail) for layer in report.layers]
    assert all(isinstance(layer, LayerCapacity) for layer in report.layers)


@pytest.mark.parametrize("name", ["full", "minikv", "nvfp4"])
def test_predicted_bytes_are_allocated(model: mk.Llama, name: str):
    rows = [list(range(90)) + list(range(40)), list(range(20))]
    result = mk.generate(model, rows, method=fitting(name), max_new_tokens=9)
    size = bucket_length(130)
    report = memory.report(model.config, fitting(name), prompt_length=size, max_new_tokens=9, batch=2, dtype="float32")
    assert report.bytes == result.cache.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(result.cache))
    assert report.packed_bytes == result.cache.packed_bytes
    assert report.layer_bytes == tuple(layer.nbytes for layer in result.cache.layers)


def test_paper_bytes():
    """MiniKV on LLaMA2-7B saves the paper's 86% of the bytes without the tail, 83% with it (4096 + 512 tokens)."""
    report = memory.report(
        mk.ModelConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=4608,
        ),
        "minikv",
        prompt_length=4096,
        max_new_tokens=512,
    )
    # (2048 kept + 512 new) tokens x 262,144 values x 4 bits (2 and the 16-bit scale and zero of 16 values).
    assert report.packed_bytes == 2560 * 262144 * 4 // 8
    assert report.full_bytes == 4608 * 262144 * 2
    assert report.packed_saved >= 0.86
    assert 0.83 <= report.saved < 0.84


def test_grouped_queries_store_kv_heads():
    config = tiny_config()
    report = memory.report(config, "full", prompt_length=64, max_new_tokens=64)
    heads = config.num_key_value_heads
    assert heads < config.num_attention_heads
    assert report.tail_bytes == 2 * config.num_hidden_layers * 128 * heads * config.head_dim * 2
