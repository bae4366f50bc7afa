"""Tests GGUF files of every family that llama.cpp has: equal to the Hugging Face checkpoint, parameter by parameter.

The `gguf` package gives the tensors' names. What llama.cpp's converter changes is repeated here by hand: the order of
channels, one added to the weights of some norms, and factors that have other names.
"""

import dataclasses
import pathlib
import re
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support.checkpoints import Tensors, gguf_writer, interleave_heads
from support.family_cases import KINDS, write_kind
from support.tiny import tiny_config

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.gguf import config_from_gguf, load_gguf
from minikv_jax.models.gguf_file import GGUFFile
from minikv_jax.models.huggingface import load_safetensors

# Kind, architecture, whether the converter interleaves q and k, and what it writes beside the sizes.
CASES: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("Gemma", "gemma", False, {}),
    ("Gemma 2", "gemma2", False, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    ("Gemma 3", "gemma3", False, {}),
    ("Phi-1, Phi-1.5, Phi-2", "phi2", False, {"rope.dimension_count": 6}),
    ("Phi-3", "phi3", False, {}),
    ("OLMo", "olmo", True, {}),
    ("OLMo 2", "olmo2", False, {}),
    ("OLMo 3", "olmo2", False, {}),
    (
        "Granite 3",
        "granite",
        True,
        {"embedding_scale": 12.0, "attention.scale": 0.3, "residual_scale": 0.22, "logit_scale": 8.0},
    ),
    ("SmolLM3, tied", "smollm3", True, {}),
    ("EXAONE 4", "exaone4", False, {}),
    ("StarCoder2", "starcoder2", False, {}),
    ("StableLM", "stablelm", False, {"rope.dimension_count": 6, "use_parallel_residual": False}),
    ("StableLM, parallel", "stablelm", False, {"rope.dimension_count": 6, "use_parallel_residual": True}),
    ("Command R", "command-r", False, {"logit_scale": 0.0625}),
    ("Command R7B", "cohere2", False, {"logit_scale": 0.0625}),
    ("GLM-4-0414", "glm4", False, {"rope.dimension_count": 8}),
    ("Arcee", "arcee", True, {}),
    ("Nemotron", "nemotron", False, {"rope.dimension_count": 6}),
    ("Seed-OSS", "seed_oss", False, {}),
    ("Hunyuan dense", "hunyuan-dense", False, {}),
    ("Mixtral", "llama", True, {"expert_count": 5, "expert_used_count": 2}),
    (
        "Qwen3-MoE",
        "qwen3moe",
        False,
        {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 20},
    ),
]
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
PATTERN = ("gemma2", "gemma3", "olmo2", "exaone4", "cohere2")  # architectures with windows in some layers


def write(path: pathlib.Path, architecture: str, config: ModelConfig, tensors: Tensors, more: dict[str, Any]) -> None:
    """Writes Hugging Face tensors under the names of the `gguf` package."""
    writer = gguf_writer(path, architecture, config)
    (writer.add_layer_norm_eps if config.design.norm_form.centred else writer.add_layer_norm_rms_eps)(
        config.rms_norm_eps
    )
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        if architecture in PATTERN:
            writer.add_sliding_window_pattern([config.window(n) is not None for n in range(config.num_hidden_layers)])
    for key, value in more.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in stacked(tensors).items():
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, name
        writer.add_tensor(renamed, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacked(tensors: Tensors) -> Tensors:
    """Joins the matrices of all experts to one tensor, as llama.cpp's converter does."""
    joined: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
        joined.setdefault(re.sub(r"\.experts\.\d+", ".experts", name), []).append(tensors[name])
    return {name: np.stack(parts) if ".experts." in name else parts[0] for name, parts in joined.items()}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("name", "architecture", "interleaves", "more"), CASES)
def test_parameters_equal_the_hugging_face_checkpoint(
    name: str, architecture: str, interleaves: bool, more: dict, tmp_path: pathlib.Path
):
    write_kind(KINDS[name], tmp_path / "hf")
    expected = load_safetensors(tmp_path / "hf")
    config = expected.config
    if architecture in ("gemma2", "gemma3"):  # the file does not say query_pre_attn_scalar; it is the head size
        config = dataclasses.replace(config, attention_multiplier=None)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for key, tensor in tensors.items():
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if interleaves and f"self_attn.{letter}_proj" in key:
                tensors[key] = interleave_heads(tensor, heads)
        if architecture in PLUS_ONE and key.endswith("norm.weight"):
            tensors[key] = tensor + 1
    write(tmp_path / "m.gguf", architecture, config, tensors, more)
    found = load_gguf(tmp_path / "m.gguf")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7 if architecture in PLUS_ONE else 0),
        nnx.state(found),
        nnx.state(expected),
    )
    # The design is compared whole, and SmolLM3's period of layers without RoPE is longer than the tiny model.
    apart = {"own_design", "unrotated_layers" if architecture == "smollm3" else ""}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in apart:
            mine, theirs = getattr(found.config, field.name), getattr(config, field.name)
            same = mine == pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else mine == theirs
            assert same, (field.name, mine, theirs)
    assert found.config.design == config.design


def read_config(path: pathlib.Path, architecture: str, *, layers: int = 6, **changes: Any) -> ModelConfig:
    """Reads the config of a file with metadata and an embedding; a change to None leaves out a key."""
    writer = gguf_writer(path, architecture, tiny_config(num_hidden_layers=layers))
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(4)
    for key, value in changes.items():
        name = f"{architecture}.attention.{key}"
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((96, 48), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config_from_gguf(GGUFFile(path))


@pytest.mark.parametrize(
    ("architecture", "full"), [("gemma2", 2), ("gemma3", 6), ("olmo2", 4), ("exaone4", 4), ("cohere2", 4)]
)
def test_patterns_of_windows(architecture: str, full: int, tmp_path: pathlib.Path):
    """Each `full`-th layer has no window, unless the file gives another period or a list."""
    listed = [False, True, True, False, False, True]
    for number, (pattern, windowed) in enumerate(
        [(None, [n % full < full - 1 for n in range(6)]), (3, [True, True, False] * 2), (listed, listed)]
    ):
        config = read_config(tmp_path / f"{number}.gguf", architecture, sliding_window_pattern=pattern)
        assert [config.window(n) == 4 for n in range(6)] == windowed
        if architecture in ("exaone4", "cohere2"):
            assert config.unrotated_layers == tuple(n for n in range(6) if not windowed[n])


@pytest.mark.parametrize(
    ("architecture", "pattern", "message"),
    [
        ("olmo2", [True, False], r"m\.gguf: attention\.sliding_window_pattern names 2 layers; accepted: a period, or "),
        ("cohere2", 0, r"cohere2\.attention\.sliding_window_pattern is 0; accepted: at least 1"),
        ("gemma3", [1, 0, 1, 0, 1, 0], r"sliding_window_pattern\[0\] is 1; accepted: true or false"),
        ("llama", 2, r"llama\.attention\.sliding_window_pattern is 2; accepted: null"),
    ],
)
def test_patterns_that_are_not_accepted_are_named(
    architecture: str, pattern: Any, message: str, tmp_path: pathlib.Path
):
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "m.gguf", architecture, sliding_window_pattern=pattern)


@pytest.mark.parametrize(("layers", "scale"), [(6, None), (46, pytest.approx((48 / 4) ** -0.5))])
def test_gemma_2_without_a_head_size(layers: int, scale: Any, tmp_path: pathlib.Path):
    """The largest model scales attention by its width, the others by the head size. A file may list heads by layer."""
    config = read_config(tmp_path / "m.gguf", "gemma2", layers=layers, key_length=None, head_count=[4] * layers)
    assert (config.head_dim, config.attention_multiplier) == (12, scale)
