import gc
import json
import pathlib
import sys
import time

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from support.checkpoints import Tensors, hf_config, interleave_heads, random_tensors, write_gguf, write_hf
from support.tiny import tiny_config, tiny_model

from minikv_jax.models import parameters as weights
from minikv_jax.models.config import RopeScaling
from minikv_jax.models.decoder import Llama
from minikv_jax.models.gguf import GGUFFile, config_from_gguf

FAMILIES = {
    "llama": tiny_config(),
    "llama tied, biased": tiny_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": tiny_config(model_type="mistral"),
    "qwen2": tiny_config(model_type="qwen2"),
    "qwen3 tied": tiny_config(model_type="qwen3", tie_word_embeddings=True),
}


def parameter(model: Llama, path: str) -> np.ndarray:
    """By its path; or the columns of a joined one that belong to the projection of that name."""
    flat = {".".join(map(str, at)): leaf[...] for at, leaf in nnx.to_flat_state(nnx.state(model))}
    for joined, names in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        *at, module, kind = path.split(".")
        if module in names:
            whole, index = np.asarray(flat[".".join((*at, joined, kind))]), names.index(module)
            config = model.config
            q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
            ends = (q, q + kv) if joined == "qkv_proj" else (config.intermediate_size,)
            return np.split(whole, ends, axis=-1)[index]
    return np.asarray(flat[path])


def assert_holds(model: Llama, tensors: Tensors) -> None:
    """Every tensor is in the model, bit for bit and at its place; nothing else is."""
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == sum(x.size for x in tensors.values())
    for name, tensor in tensors.items():
        path = name.removeprefix("model.").removesuffix(".weight")
        if name.endswith("bias"):
            np.testing.assert_array_equal(parameter(model, path), tensor)
        elif "embed" in name:
            np.testing.assert_array_equal(parameter(model, path + ".embedding"), tensor)
        elif "norm" in name:
            np.testing.assert_array_equal(parameter(model, path + ".scale"), tensor)
        else:
            np.testing.assert_array_equal(parameter(model, path + ".kernel"), tensor.T)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_fill_every_parameter(tmp_path: pathlib.Path, family: str, shards: int):
    config, tensors = FAMILIES[family], random_tensors(FAMILIES[family])
    write_hf(tmp_path, config, tensors, shards)
    model = weights.load_safetensors(tmp_path)
    assert model.config == config
    assert_holds(model, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_fills_every_parameter(tmp_path: pathlib.Path, family: str):
    config, tensors = FAMILIES[family], random_tensors(FAMILIES[family])
    write_gguf(tmp_path / "m.gguf", config, tensors)
    model = weights.load_gguf(tmp_path / "m.gguf")
    # A GGUF file says "llama" for Mistral without a window; float32 metadata rounds the epsilon.
    assert model.config.num_key_value_heads == config.num_key_value_heads
    assert (model.config.qkv_bias, model.config.qk_norm) == (config.qkv_bias, config.qk_norm)
    assert model.config.tie_word_embeddings == config.tie_word_embeddings
    assert_holds(model, tensors)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype_is_cast_once(tmp_path: pathlib.Path, stored: type, wanted: str):
    config = tiny_config(num_hidden_layers=1)
    tensors = {name: tensor.astype(stored) for name, tensor in random_tensors(config).items()}
    write_hf(tmp_path, config, tensors)
    model = weights.load_safetensors(tmp_path, dtype=wanted)
    assert_holds(model, {name: tensor.astype(jnp.dtype(wanted)) for name, tensor in tensors.items()})


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
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1 << 12)  # several blocks of rows per tensor
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
    assert_holds(weights.load_gguf(tmp_path / "m.gguf"), tensors)


def test_gguf_q4_1_is_scale_times_code_plus_minimum(tmp_path: pathlib.Path):
    config = tiny_config(hidden_size=64, intermediate_size=64)
    tensors = random_tensors(config)
    tensor = tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "m.gguf", config, tensors, kind=gguf.GGMLQuantizationType.Q4_1)
    groups = tensor.reshape(64, 2, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    found = parameter(weights.load_gguf(tmp_path / "m.gguf"), "layers.1.mlp.up_proj.kernel").T.reshape(64, 2, 32)
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
    found = weights.load_gguf(tmp_path / "m.gguf").config
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
        weights.load_gguf(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path: pathlib.Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='gpt2': expected one of llama, qwen2, qwen3"):
        weights.load_gguf(tmp_path / "m.gguf")


def test_interleaving_is_not_its_own_inverse():
    rows = np.arange(16)[:, None]
    assert interleave_heads(rows, 2)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


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
        weights.load_safetensors(tmp_path) if kind == "hf" else weights.load_gguf(at)
    text = str(error.value)
    for part in ("adapter.weight", "norm.scale", "layers.0.mlp.up_proj.kernel", "[16, 48], the config needs [32, 48]"):
        assert part in text
    assert ("model.layers.5." if kind == "hf" else "blk.5.") in text
    assert str(tmp_path) in text


def test_rotary_buffers_of_old_files_are_known(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write_hf(tmp_path, config, tensors | buffers)
    assert_holds(weights.load_safetensors(tmp_path), tensors)


def test_a_repeated_tied_embedding_must_be_the_same(tmp_path: pathlib.Path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    write_hf(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_holds(weights.load_safetensors(tmp_path), tensors)
    write_hf(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        weights.load_safetensors(tmp_path)


def test_integer_weights_are_refused(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_hf(tmp_path, config, tensors | {"model.norm.weight": np.zeros(48, np.int8)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(I8\)"):
        weights.load_safetensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_are_named(tmp_path: pathlib.Path, keep: int):
    write_hf(tmp_path, tiny_config(), random_tensors(tiny_config()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        weights.load_safetensors(tmp_path)


# The last one cuts inside the last tensor, beyond any padding at the end of the file.
@pytest.mark.parametrize("keep", [0, 3, 10, 60, 400, 2000, -40])
def test_truncated_gguf_is_named(tmp_path: pathlib.Path, keep: int):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf is not a complete GGUF file"):
        weights.load_gguf(path)


@pytest.mark.parametrize("at", [4, 8, 16, 24, 40, 64])
def test_a_corrupt_gguf_header_is_named(tmp_path: pathlib.Path, at: int):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_config(), random_tensors(tiny_config()))
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"m\.gguf"):
        weights.load_gguf(path)


def test_missing_files_are_named(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny_config())))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weights.load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf does not exist"):
        weights.load_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        weights.restore(tmp_path / "absent")


def test_shards_must_agree_with_their_index(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_hf(tmp_path, config, tensors, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"surprise": np.zeros(1, np.float32)}, shard)
    with pytest.raises(ValueError, match=r"disagrees with its files about: .*surprise in model-00002"):
        weights.load_safetensors(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00002-of-00002"):
        weights.load_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        weights.load_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_round_trip(tmp_path: pathlib.Path, dtype: str):
    rope = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16)
    model = tiny_model(dtype=dtype, model_type="qwen3", rope_scaling=rope, eos_token_ids=(2, 5))
    weights.save(model, tmp_path / "saved")
    assert weights.is_orbax(tmp_path / "saved")
    assert weights.restore_config(tmp_path / "saved") == model.config
    restored = weights.restore(tmp_path / "saved", dtype=dtype)
    assert restored.config == model.config
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(restored), nnx.state(model)))
    half = weights.restore(tmp_path / "saved", dtype="float16")
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(nnx.state(half)))
    with pytest.raises(ValueError, match="already exists"):
        weights.save(model, tmp_path / "saved")


def test_orbax_that_does_not_fit_its_config_is_an_error(tmp_path: pathlib.Path):
    weights.save(tiny_model(), tmp_path / "saved")
    stored = tmp_path / "saved" / "config" / "metadata"
    raw = json.loads(stored.read_text())
    stored.write_text(json.dumps(raw | {"num_hidden_layers": 1, "intermediate_size": 96, "attention_bias": True}))
    with pytest.raises(ValueError, match="does not fit its config") as error:
        weights.restore(tmp_path / "saved")
    for part in (
        "unknown tensors: layers.1.",
        "layers.0.self_attn.o_proj.bias",
        "layers.0.mlp.gate_up_proj.kernel is [48, 160], the config needs [48, 192]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("damage", ["config/metadata", "params/_METADATA", "params/manifest.ocdbt"])
def test_damaged_orbax_is_named(tmp_path: pathlib.Path, damage: str, monkeypatch: pytest.MonkeyPatch):
    weights.save(tiny_model(), tmp_path / "saved")
    (tmp_path / "saved" / damage).write_bytes(b"x")
    # Orbax reads the arrays together and closes its event loop at the first failure; the others then report to it.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(ValueError, match="saved is not a complete minikv_jax checkpoint"):
        weights.restore(tmp_path / "saved")
    gc.collect()
    time.sleep(0.5)
