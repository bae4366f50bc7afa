import pathlib

import gguf
import numpy as np
import pytest
from support.checkpoints import assert_holds, interleave_heads, parameter, random_tensors, write_gguf
from support.tiny import tiny_config

from minikv_jax.models import parameters
from minikv_jax.models.config import RopeScaling
from minikv_jax.models.gguf import GGUFFile, config_from_gguf, load_gguf


def random_blocks(shape: tuple[int, int], kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Any bytes are valid K-quant blocks but for the float16 scales, which are kept small and finite."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, width), np.uint8)
    for at in scales:
        values = rng.uniform(1e-4, 1e-2, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = values[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


GGUF_KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("name", GGUF_KINDS)
def test_gguf_quant_types(tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parameters, "_BLOCK_ELEMENTS", 1 << 12)  # several blocks of rows per tensor
    kind = gguf.GGMLQuantizationType[name]
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1, vocab_size=40)
    rng = np.random.default_rng(0)
    tensors, stored = random_tensors(config), {}
    for key, tensor in tensors.items():
        stored[key] = tensor
        if tensor.ndim == 2:
            blocks = random_blocks(tensor.shape, kind, rng) if "_K" in name else gguf.quants.quantize(tensor, kind)
            stored[key] = blocks.view(np.uint8)
            tensors[key] = gguf.quants.dequantize(stored[key], kind)
            assert np.all(np.isfinite(tensors[key]))
    write_gguf(tmp_path / "m.gguf", config, stored, kind=kind)
    assert GGUFFile(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"].kind == kind
    assert_holds(load_gguf(tmp_path / "m.gguf"), tensors)


def test_gguf_q4_1_is_scale_times_code_plus_minimum(tmp_path: pathlib.Path):
    config = tiny_config(hidden_size=64, intermediate_size=64)
    tensors = random_tensors(config)
    tensor = tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "m.gguf", config, tensors, kind=gguf.GGMLQuantizationType.Q4_1)
    groups = tensor.reshape(64, 2, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    found = parameter(load_gguf(tmp_path / "m.gguf"), "layers.1.mlp.up_proj.kernel").T.reshape(64, 2, 32)
    # Half a step, and the rounding of scale and minimum to float16.
    assert np.all(np.abs(found - groups) <= (high - low) / 30 + 2e-3 * np.maximum(np.abs(low), np.abs(high)))


def test_gguf_config_reads_what_changes_the_model(tmp_path: pathlib.Path):
    config, factors = tiny_config(), np.linspace(1, 8, 8, dtype=np.float32)
    metadata = {
        "llama.attention.sliding_window": 5,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "llama.vocab_size": 96,
    }
    write_gguf(
        tmp_path / "m.gguf", config, random_tensors(config), metadata=metadata, extra={"rope_freqs.weight": factors}
    )
    found = load_gguf(tmp_path / "m.gguf").config
    assert found.window(0) == 5
    assert found.eos_token_ids == (2, 3)
    assert found.rope_scaling == RopeScaling(rope_type="factors", factors=tuple(factors.tolist()))
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "n.gguf", config, random_tensors(config), metadata=metadata)
    found = config_from_gguf(GGUFFile(tmp_path / "n.gguf"))
    assert found.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8.*head size 16"),
        ({"split.count": 2}, "one part of 2"),
    ],
)
def test_gguf_settings_that_are_not_supported(tmp_path: pathlib.Path, metadata: dict, message: str):
    write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config()), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path: pathlib.Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='gpt2': expected one of llama, qwen2, qwen3"):
        load_gguf(tmp_path / "m.gguf")


def test_interleaving_is_not_its_own_inverse():
    rows = np.arange(16)[:, None]
    assert interleave_heads(rows, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# The last one cuts inside the last tensor, beyond any padding at the end of the file.
@pytest.mark.parametrize("keep", [0, 3, 10, 60, 400, 2000, -40])
def test_truncated_gguf_is_named(tmp_path: pathlib.Path, keep: int):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf is not a complete GGUF file"):
        load_gguf(path)


@pytest.mark.parametrize("at", [4, 8, 16, 24, 40, 64])
def test_a_corrupt_gguf_header_is_named(tmp_path: pathlib.Path, at: int):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"m\.gguf"):
        load_gguf(path)
