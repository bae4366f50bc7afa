"""Writes tiny checkpoints, independently of the library's readers, and checks models read from them."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.family import Fields

Tensors = dict[str, np.ndarray]
F32 = gguf.GGMLQuantizationType.F32

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Hugging Face names and `[out, in]` shapes of a model, filled with random float32 values."""
    d, i, h = config.hidden_size, config.intermediate_size, config.head_dim
    n, k = config.num_attention_heads * h, config.num_key_value_heads * h
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
        for name, rows in (("q", n), ("k", k), ("v", k)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, d)
            shapes |= {f"{at}self_attn.{name}_proj.bias": (rows,)} if config.qkv_bias else {}
        shapes[at + "self_attn.o_proj.weight"] = (d, n)
        shapes |= {at + "self_attn.o_proj.bias": (d,)} if config.attention_bias else {}
        if config.design.qk_norm:
            shapes |= {at + "self_attn.q_norm.weight": (h,), at + "self_attn.k_norm.weight": (h,)}
        for name, shape in (("gate", (i, d)), ("up", (i, d)), ("down", (d, i))):
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            shapes |= {f"{at}mlp.{name}_proj.bias": shape[:1]} if config.mlp_bias else {}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) * 0.2 for name, shape in shapes.items()}


def hf_config(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """Makes the config.json of a model without windows and rope scaling."""
    names = {"model_type", "sliding_window", *Fields.model_fields} - {"rope_scaling"}
    names |= {name for name in ("attention_bias", "mlp_bias") if name in config.family.fields.model_fields}
    raw = {name: value for name, value in config.to_dict().items() if name in names}
    return raw | {"eos_token_id": list(config.eos_token_ids)} | changes


def write_hf(directory: pathlib.Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return
    weight_map = {
        name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name, at in weight_map.items() if at == shard}, directory / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def gguf_name(name: str) -> str:
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in plain or name == "lm_head.weight":
        return plain.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"


def interleave_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Puts q or k rows in llama.cpp's order: channel i of a head's first half, then of its second half."""
    rows = []
    size = tensor.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            rows += [tensor[head * size + i], tensor[head * size + size // 2 + i]]
    return np.stack(rows)


def gguf_writer(path: pathlib.Path, architecture: str, config: ModelConfig) -> gguf.GGUFWriter:
    """Begins a GGUF file with the sizes of a model."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_theta)
    return writer


def write_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType = F32,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes Hugging Face tensors as a GGUF file; matrices are stored as `kind`, vectors as float32.

    A uint8 matrix already holds blocks of `kind`.
    """
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf_writer(path, architecture, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        value_type = gguf.GGUFValueType.get_type(value)
        if isinstance(value, int | float) and abs(value) >= 1 << 31:  # it would have 32 bits
            value_type = gguf.GGUFValueType.INT64 if isinstance(value, int) else gguf.GGUFValueType.FLOAT64
        writer.add_key_value(key, value, value_type)
    for name, tensor in tensors.items():
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if architecture == "llama" and f"self_attn.{letter}_proj" in name:
                tensor = interleave_heads(tensor, heads)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor)
        else:
            blocks = tensor if tensor.dtype == np.uint8 else gguf.quants.quantize(tensor, kind)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parameter(model: Llama, path: str) -> np.ndarray:
    """Returns the parameter at a path, or a projection's columns of a joined parameter."""
    flat = {".".join(map(str, at)): leaf[...] for at, leaf in nnx.to_flat_state(nnx.state(model))}
    *at, module, kind = path.split(".")
    config, h = model.config, model.config.head_dim
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads * h
    groups = math.gcd(kv_heads, config.intermediate_size)
    half = config.intermediate_size // groups
    places = {  # joined parameter, groups, first and last column in each group
        "q_proj": ("qkv_proj", kv_heads, 0, group),
        "k_proj": ("qkv_proj", kv_heads, group, group + h),
        "v_proj": ("qkv_proj", kv_heads, group + h, group + 2 * h),
        "gate_proj": ("gate_up_proj", groups, 0, half),
        "up_proj": ("gate_up_proj", groups, half, 2 * half),
    }
    if module not in places:
        return np.asarray(flat[path])
    joined, count, first, last = places[module]
    whole = np.asarray(flat[".".join((*at, joined, kind))])
    grouped = np.stack(np.split(whole, count, axis=-1), axis=-2)
    return grouped[..., first:last].reshape(*whole.shape[:-1], -1)


def assert_holds(model: Llama, tensors: Tensors) -> None:
    """Checks that the model has exactly these tensors as parameters, bit for bit."""
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
