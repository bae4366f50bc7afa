"""Tests models split over a mesh: each device's part, and what loading reads."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from support.checkpoints import random_tensors, write_gguf, write_hf
from support.tiny import tiny_config, tiny_model

from minikv_jax import meshes
from minikv_jax.models import hub, parameters
from minikv_jax.models.decoder import Llama
from minikv_jax.models.gguf import load_gguf
from minikv_jax.models.partition import check_mesh, device_part, shard_model

SIZES: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


def shards(model: Llama) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of every parameter's parts on the devices."""
    flat = {".".join(map(str, at)): leaf[...] for at, leaf in nnx.to_flat_state(nnx.state(model))}
    return {name: [shard.data.shape for shard in leaf.addressable_shards] for name, leaf in flat.items()}


def assert_equal(first: Llama, second: Llama) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


def test_whole_heads_columns_and_vocabulary_are_split():
    model = shard_model(tiny_model(**SIZES, tie_word_embeddings=True), meshes.make_mesh({"data": 2, "model": 4}))
    held = shards(model)
    # 2 query heads, a key head and a value head of 16 channels
    assert held["layers.0.self_attn.qkv_proj.kernel"] == [(48, 64)] * 8
    assert held["layers.0.self_attn.o_proj.kernel"] == [(32, 48)] * 8
    assert held["layers.0.mlp.gate_up_proj.kernel"] == [(48, 48)] * 8
    assert held["layers.0.mlp.down_proj.kernel"] == [(24, 48)] * 8
    assert held["embed_tokens.embedding"] == [(24, 48)] * 8
    assert held["norm.scale"] == [(48,)] * 8


def test_what_does_not_divide():
    config = tiny_config(**SIZES, vocab_size=97)
    whole = shards(shard_model(tiny_model(**SIZES, vocab_size=97), meshes.make_mesh({"model": 4})))
    assert whole["lm_head.kernel"] == [(48, 97)] * 4  # a vocabulary stays whole
    with pytest.raises(ValueError, match="mesh axis model=8: num_key_value_heads=4 cannot be split into 8 equal parts"):
        check_mesh(config, meshes.make_mesh({"model": 8}))
    odd = dataclasses.replace(config, intermediate_size=90)
    with pytest.raises(ValueError, match="mesh axis model=4: intermediate_size=90 cannot be split"):
        check_mesh(odd, meshes.make_mesh({"model": 4}))


def test_the_part_of_one_device_is_a_smaller_model():
    part = device_part(tiny_config(**SIZES), 4)
    assert (part.num_attention_heads, part.num_key_value_heads, part.intermediate_size) == (2, 1, 24)
    assert (part.vocab_size, part.hidden_size, part.head_dim) == (24, 48, 16)


@pytest.mark.parametrize("shards_of_the_file", [1, 3])
def test_loading_reads_each_devices_part_from_safetensors(tmp_path: pathlib.Path, shards_of_the_file: int):
    config = tiny_config(**SIZES, attention_bias=True)
    write_hf(tmp_path / "m", config, random_tensors(config), shards_of_the_file)
    mesh = meshes.make_mesh({"data": 2, "model": 4})
    model, _ = hub.load(tmp_path / "m", mesh=mesh)
    one, _ = hub.load(tmp_path / "m")
    assert_equal(model, one)
    assert shards(model) == shards(shard_model(one, mesh))
    with jax.set_mesh(jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])):
        ambient, _ = hub.load(tmp_path / "m")
    assert shards(ambient) == shards(shard_model(one, meshes.make_mesh({"model": 4})))


def test_loading_reads_each_devices_part_from_gguf(tmp_path: pathlib.Path):
    """The heads of queries and keys are interleaved in the file."""
    config = tiny_config(**SIZES | {"hidden_size": 64, "intermediate_size": 128})
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    model = load_gguf(tmp_path / "m.gguf", mesh=meshes.make_mesh({"model": 2}))
    assert_equal(model, load_gguf(tmp_path / "m.gguf"))


def test_a_saved_model_is_restored_onto_another_mesh(tmp_path: pathlib.Path):
    model = tiny_model(**SIZES)
    hub.save(shard_model(model, meshes.make_mesh({"model": 4})), None, tmp_path / "saved")
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    restored, _ = hub.load(tmp_path / "saved", mesh=mesh)
    assert_equal(restored, model)
    assert shards(restored) == shards(shard_model(model, mesh))
    assert_equal(hub.load(tmp_path / "saved")[0], model)


def test_a_process_reads_no_more_than_its_devices_hold(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """This holds for tensors split by rows in the file; those split by columns are read a few rows at a time."""
    config = tiny_config(**SIZES)
    write_hf(tmp_path / "m", config, random_tensors(config))
    read: list[tuple[str, int]] = []
    original = parameters.TensorReader.block

    def block(self: Any, name: str, rule: Any, path: str, bounds: Any) -> np.ndarray:
        out = original(self, name, rule, path, bounds)
        read.append((name, out.nbytes))
        return out

    monkeypatch.setattr(parameters.TensorReader, "block", block)
    hub.load(tmp_path / "m", mesh=meshes.make_mesh({"model": 4}))
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        assert sum(size for at, size in read if at == name) == tensor.nbytes  # read once in total, however many devices
    most = max(size for _, size in read)
    assert most <= max(tensor.nbytes for name, tensor in tensors.items() if "embed" in name)


@pytest.mark.slow
def test_loading_holds_one_tensor_beside_the_model(tmp_path: pathlib.Path):
    """Of a checkpoint in three files, on eight devices of one process."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 5,
        "vocab_size": 16384,
    }
    config = tiny_config(**sizes, num_attention_heads=16, num_key_value_heads=8, head_dim=64)
    write_hf(tmp_path / "m", config, random_tensors(config), shards=3)
    script = pathlib.Path(__file__).parents[1] / "support" / "load_peak.py"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(script), str(tmp_path / "m"), "model=8"]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)
    assert memory["kept"] > 4 * memory["largest"]
    assert memory["over"] <= memory["largest"] + (32 << 20)  # plus the working memory of Python and JAX
