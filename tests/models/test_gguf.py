"""Tests models in GGUF files: loading, dequantisation, and refusals."""

import math
import pathlib

import gguf
import numpy as np
import pytest
from support.checkpoints import assert_holds, interleave_heads, parameter, random_tensors, write_gguf
from support.tiny import tiny_config

from minikv_jax.models.config import RopeScaling
from minikv_jax.models.gguf import config_from_gguf, load_gguf
from minikv_jax.models.gguf_file import GGUFFile


def random_blocks(shape: tuple[int, int], kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Makes random K-quant blocks: any bytes, with small and finite float16 scales."""
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
    monkeypatch.setattr("minikv_jax.models.tensors._BLOCK_ELEMENTS", 1 << 12)  # several blocks of rows per tensor
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
        (
            {"llama.rope.scaling.type": "yarn"},
            "m.gguf: llama.rope.scaling.type is 'yarn'; accepted: 'none' or 'linear'",
        ),
        ({"llama.rope.dimension_count": 8}, "m.gguf: llama.rope.dimension_count is 8; accepted: the head size 16"),
        ({"split.count": 2}, "one part of 2"),
        ({"split.count": "2"}, "m.gguf: split.count is '2'; accepted: an integer"),
        ({"general.alignment": 0}, "general.alignment is 0; accepted: at least 8"),
        ({"general.alignment": 32.0}, "general.alignment is 32.0; accepted: an integer"),
        ({"llama.block_count": "2"}, "m.gguf: llama.block_count is '2'; accepted: an integer"),
        ({"llama.block_count": 2.0}, "llama.block_count is 2.0; accepted: an integer"),
        ({"llama.block_count": True}, "llama.block_count is True; accepted: an integer"),
        ({"llama.block_count": 10**12}, "llama.block_count is 1000000000000; accepted: at most 4096"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is 0; accepted: at least 1"),
        ({"llama.embedding_length": [48]}, r"llama.embedding_length is \[48\]; accepted: an integer"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; accepted: at least 1"),
        ({"llama.attention.head_count": [4, 2]}, r"attention.head_count is \[4, 2\]; accepted: one value for all"),
        ({"llama.attention.head_count": [4]}, r"attention.head_count is \[4\]; accepted: one value for all of the 2"),
        ({"llama.attention.head_count_kv": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"llama.attention.layer_norm_rms_epsilon": math.inf}, "epsilon is inf; accepted: a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is 'x'; accepted: a number"),
        ({"llama.rope.freq_base": math.nan}, "llama.rope.freq_base is nan; accepted: a finite number"),
        ({"llama.rope.freq_base": 0.0}, r"llama.rope.freq_base is 0.0; accepted: at least 1"),
        ({"llama.rope.scaling.type": "linear"}, "'linear', but there is no rope.scaling.factor"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": math.inf}, "factor is inf; accepted"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5; accepted: null"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0; accepted: 1, which changes nothing"),
        ({"llama.expert_count": 8}, "expert_used_count is missing, though expert_count is 8"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False; accepted: True"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "tokenizer.ggml.eos_token_id is '2'; accepted: an integer"),
        ({"tokenizer.ggml.eos_token_id": 96}, r"m.gguf: eos_token_ids=\(96,\) must lie in 0..95"),
    ],
)
def test_gguf_settings_that_are_not_supported(tmp_path: pathlib.Path, metadata: dict, message: str):
    write_gguf(tmp_path / "m.gguf", tiny_config(), random_tensors(tiny_config()), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_a_missing_epsilon_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layer_norm_rms_epsilon", b"layer_norm_rms_epsilom"))
    with pytest.raises(ValueError, match=r"m\.gguf lacks llama\.attention\.layer_norm_rms_epsilon$"):
        load_gguf(path)


def test_tensors_that_do_not_follow_each_other_are_refused(tmp_path: pathlib.Path):
    """Such a file would load with one tensor's bytes as another's."""
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8 + 4
    content[at : at + 8] = (0).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_norm\.weight begins at byte 0 of the data; accepted: \d+"):
        load_gguf(path)


def test_types_that_cannot_be_dequantised_are_named_first(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_gguf(tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": np.ones(8, np.int32)})
    with pytest.raises(ValueError, match=r"cannot be dequantised: rope_freqs\.weight \(I32\)"):
        load_gguf(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path: pathlib.Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='gpt2': expected one of .*llama, .*qwen2, qwen3"):
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
