"""Tests the conversion of checkpoint tensors to parameters."""

import dataclasses
import functools
import json
import pathlib
import re
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.checkpoints import (
    Tensors,
    assert_holds,
    hf_config,
    parameter,
    random_tensors,
    write_gguf,
    write_hf,
)
from support.tiny import tiny_config

from minikv_jax.models import checkpoint
from minikv_jax.models.decoder import Llama
from minikv_jax.models.gguf import load_gguf
from minikv_jax.models.huggingface import load_safetensors

FAMILIES = {
    "llama": tiny_config(),
    "llama tied, biased": tiny_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": tiny_config(model_type="mistral"),
    "qwen2": tiny_config(model_type="qwen2"),
    "qwen3 tied": tiny_config(model_type="qwen3", tie_word_embeddings=True),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_fill_every_parameter(tmp_path: pathlib.Path, family: str, shards: int):
    config, tensors = FAMILIES[family], random_tensors(FAMILIES[family])
    write_hf(tmp_path, config, tensors, shards)
    model = load_safetensors(tmp_path)
    assert model.config == config
    assert_holds(model, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_fills_every_parameter(tmp_path: pathlib.Path, family: str):
    config, tensors = FAMILIES[family], random_tensors(FAMILIES[family])
    write_gguf(tmp_path / "m.gguf", config, tensors)
    model = load_gguf(tmp_path / "m.gguf")
    # A GGUF file says "llama" for Mistral without a window; float32 metadata rounds the epsilon.
    assert model.config.num_key_value_heads == config.num_key_value_heads
    assert (model.config.qkv_bias, model.config.design.qk_norm) == (config.qkv_bias, config.design.qk_norm)
    assert model.config.tie_word_embeddings == config.tie_word_embeddings
    assert_holds(model, tensors)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype_is_cast_once(tmp_path: pathlib.Path, stored: type, wanted: str):
    config = tiny_config(num_hidden_layers=1)
    tensors = {name: tensor.astype(stored) for name, tensor in random_tensors(config).items()}
    write_hf(tmp_path, config, tensors)
    model = load_safetensors(tmp_path, dtype=wanted)
    assert_holds(model, {name: tensor.astype(jnp.dtype(wanted)) for name, tensor in tensors.items()})


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_all_misfits_are_listed_at_once(tmp_path: pathlib.Path, kind: str):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    extra = {"adapter.weight": np.zeros(3, np.float32)}
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.zeros((16, 48), np.float32)
    tensors["model.layers.5.self_attn.v_proj.weight"] = np.zeros((32, 48), np.float32)
    at = tmp_path / "m.gguf"
    if kind == "hf":
        write_hf(tmp_path, config, tensors | extra)
    else:
        write_gguf(at, config, tensors, extra=extra)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        load_safetensors(tmp_path) if kind == "hf" else load_gguf(at)
    text = str(error.value)
    for part in ("adapter.weight", "norm.scale", "layers.0.mlp.up_proj.kernel", "[16, 48], the config needs [32, 48]"):
        assert part in text
    assert ("model.layers.5." if kind == "hf" else "blk.5.") in text
    assert str(tmp_path) in text


def test_a_repeated_tied_embedding_must_be_the_same(tmp_path: pathlib.Path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    write_hf(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_holds(load_safetensors(tmp_path), tensors)
    write_hf(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_safetensors(tmp_path)
    write_hf(tmp_path, config, tensors | {"lm_head.weight": np.ones((), np.float32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[\], the embedding \[96, 48\]"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("kind", ["hf", "gguf", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_named(tmp_path: pathlib.Path, kind: str, dtype: str):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.layers.0.mlp.up_proj.weight"][7, 9] = np.inf
    tensors["model.layers.1.self_attn.v_proj.weight"][1, 2] = -np.inf
    tensors["lm_head.weight"][2, 0] = -1e30  # infinite only in float16
    write_hf(tmp_path / "hf", config, tensors)
    names = {"hf": ("norm.weight", "0.mlp.up_proj", "1.self_attn.v_proj", "lm_head"),
             "gguf": ("output_norm", "0.ffn_up", "1.attn_v", "output.weight"),
             "orbax": ("norm.scale", "0.mlp.gate_up_proj", "1.self_attn.qkv_proj", "lm_head")}[kind]  # fmt: skip
    if kind == "gguf":
        write_gguf(tmp_path / "m.gguf", config, tensors)
        load = functools.partial(load_gguf, tmp_path / "m.gguf", dtype=dtype)
    elif kind == "hf":
        load = functools.partial(load_safetensors, tmp_path / "hf", dtype=dtype)
    else:
        checkpoint.save(load_safetensors(tmp_path / "hf", allow_nonfinite=True), tmp_path / "orbax")
        load = functools.partial(checkpoint.restore, tmp_path / "orbax", dtype=dtype)
    with pytest.raises(ValueError, match=r"NaN or infinite values in .*--allow-nonfinite") as error:
        load()
    expected = names if dtype == "float16" else names[:-1]
    listed = re.search(r"values in (.*): load", str(error.value))
    assert listed is not None
    found = listed[1].split(", ")
    assert len(found) == len(expected)
    assert all(any(name in tensor for tensor in found) for name in expected)
    assert np.isnan(parameter(load(allow_nonfinite=True), "norm.scale")).sum() == 1


@pytest.mark.parametrize("layers", [3, 4096])
def test_a_config_of_more_layers_is_named_before_a_model_is_built(tmp_path: pathlib.Path, layers: int):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_hf(tmp_path, config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config, num_hidden_layers=layers)))
    write_gguf(tmp_path / "m.gguf", dataclasses.replace(config, num_hidden_layers=layers), tensors)
    checkpoint.save(load_safetensors_of(tmp_path, tensors), tmp_path / "orbax")
    stored = tmp_path / "orbax" / "config" / "metadata"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"num_hidden_layers": layers}))
    for load, path in ((load_safetensors, ""), (load_gguf, "m.gguf"), (checkpoint.restore, "orbax")):
        begin = time.perf_counter()
        with pytest.raises(ValueError, match=f"num_hidden_layers={layers}, but there are tensors of 2 layers"):
            load(tmp_path / path)
        assert time.perf_counter() - begin < 5


def load_safetensors_of(directory: pathlib.Path, tensors: Tensors) -> Llama:
    write_hf(directory / "plain", tiny_config(), tensors)
    return load_safetensors(directory / "plain")


def test_names_from_files_are_escaped_and_not_without_end(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    unknown = {f"\x1b]0;{number}\x07": np.zeros(1, np.float32) for number in range(200)}
    write_hf(tmp_path, config, tensors | unknown)
    with pytest.raises(ValueError, match=r"unknown tensors: \\x1b\]0;\d+\\x07, .* and 100 more") as error:
        load_safetensors(tmp_path)
    assert str(error.value).isprintable()


def test_missing_files_are_named(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config())))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf does not exist"):
        load_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        checkpoint.restore(tmp_path / "absent")
