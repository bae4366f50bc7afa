"""Tests a measured generation."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from support.bench import bench_case
from support.tiny import tiny_config, tiny_model

from minikv_jax.bench import end_to_end, random_models
from minikv_jax.bench.end_to_end import CacheLengths, Case
from minikv_jax.cache import memory
from minikv_jax.generate import generate, stream
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.models.experts import Experts


def test_row_says_what_was_allocated_and_read(shape: str):
    asked = bench_case(shape)
    row = end_to_end.measure(asked)
    config, method = asked.config(), lookup.get("minikv")
    # 100 tokens are padded to 112
    sizes = memory.report(config, method, prompt_length=112, max_new_tokens=160, batch=2, dtype="float32")
    assert row["cache_bytes"] == sizes.bytes
    assert row["weight_bytes"] == memory.weight_bytes(config, "float32")
    assert row["predicted_bytes"] > row["weight_bytes"] + row["cache_bytes"]
    assert row["decode"]["middle"]["first_step"] == 76
    assert row["decode"]["end"]["first_step"] == 152
    assert 0 < row["decode"]["middle"]["cache_bytes_read"] <= sizes.bytes
    assert 0 < row["decode"]["end"]["cache_bytes_read"] <= sizes.bytes
    assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["decode_ms"])
    assert 0 < row["prefill_s"] < row["time_to_first_token_s"]
    assert "all" in end_to_end.measure(bench_case(shape, steps=None, max_new_tokens=4))["decode"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_weights_are_of_the_asked_dtype(model_directory: pathlib.Path, dtype: str):
    """The method may have changed settings."""
    asked = Case(
        model=str(model_directory), method="minikv:k_bits=4", batch=1, prompt_len=64, max_new_tokens=4, dtype=dtype
    )
    row = end_to_end.measure(asked)
    method = dataclasses.replace(lookup.get("minikv"), quantizer=MinMax(k_bits=4))
    sizes = memory.report(asked.config(), method, prompt_length=64, max_new_tokens=4, dtype=dtype)
    assert row["cache_bytes"] == sizes.bytes
    assert row["weight_bytes"] == memory.weight_bytes(asked.config(), dtype)


@pytest.mark.parametrize("method", ["minikv", "kivi-2", "full"])
@pytest.mark.parametrize("step", [1, 60, 159])
def test_a_stretch_starts_where_decoding_would_have_come(method: str, step: int):
    model = tiny_model(max_position_embeddings=512, head_dim=32)
    results = stream(model, [[1] * 70, [2] * 33], method=method, max_new_tokens=160, eos_token_ids=(), chunk=step)
    prompt = CacheLengths.of(next(results).cache)
    decoded = next(results).cache
    assert jax.tree.all(jax.tree.map(np.array_equal, prompt.after(step, decoded), CacheLengths.of(decoded)))


def test_bytes_read_are_those_of_the_valid_tokens():
    cache = generate(tiny_model(), [[1] * 40], method="full", max_new_tokens=10, eos_token_ids=()).cache
    layers, kv_heads, head_dim, both, size = 2, 2, 16, 2, 4
    now = CacheLengths.of(cache)
    assert end_to_end.bytes_read(cache, now, range(1)) == 50 * both * layers * kv_heads * head_dim * size
    assert end_to_end.bytes_read(cache, now, range(3)) == 51 * both * layers * kv_heads * head_dim * size


def test_random_model_has_the_config_and_no_constant_weight(shape: str):
    config = bench_case(shape).config()
    model = random_models.random_model(config, "bfloat16")
    assert model.config == config
    for leaf in jax.tree.leaves(nnx.state(model)):
        assert leaf.dtype == "bfloat16"
        assert leaf.ndim == 1 or float(leaf.std()) > 0.01


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)],
)
def test_named_shapes_have_the_published_number_of_parameters(name: str, parameters: int):
    config = random_models.shape_config(name)
    leaves = jax.tree.leaves(nnx.state(random_models.skeleton(config, "bfloat16")))
    assert sum(leaf.size for leaf in leaves) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"unrotated_layers": (1, 3)},
        {"experts": Experts(count=4, per_token=2, intermediate_size=16, dense_layers=(0, 3))},
        {"sliding_window": 4, "layer_types": ("full_attention",) * 3 + ("sliding_attention",)},
        {"attention_chunk_size": 4, "layer_types": ("full_attention",) * 3 + ("chunked_attention",)},
    ],
)
def test_first_layers_keep_what_concerns_them(changes: dict[str, Any]):
    config = random_models.first_layers(tiny_config(num_hidden_layers=4, **changes), 2)
    assert config.num_hidden_layers == 2
    assert config.unrotated_layers == changes.get("unrotated_layers", ())[:1]
    assert config.experts is None or config.experts.dense_layers == (0,)
    assert config.sliding_window is config.attention_chunk_size is None


@pytest.mark.parametrize("name", ["llama2-7b", "llama-3.1-8b"])
@pytest.mark.parametrize("method", ["full", "minikv"])
def test_performance_page_shows_the_formula(name: str, method: str):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    config = random_models.shape_config(name)
    weights = memory.weight_bytes(config) + 2 * config.vocab_size * config.hidden_size  # and the embedding table

    def cache(prompt: int) -> int:
        return memory.report(config, lookup.get(method), prompt_length=prompt, max_new_tokens=1024).bytes

    row = cache(2048)
    rows = [(limit * 10**9 - weights) // row for limit in (40, 80)]
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} | `{method}` | {row:,} | "))
    assert f"| {rows[0]} | {rows[1]} |" in line
    longest = int(line.rstrip("k |").split("| ")[-1].replace(",", ""))
    assert weights + cache(1024 * longest) <= 40e9 < weights + cache(1024 * (longest + 1))
