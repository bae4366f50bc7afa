"""Kinds of models that people try: small random checkpoints written by transformers, to compare with."""

import dataclasses
import pathlib
from typing import Any

import torch
import transformers

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 5}
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
H16 = {"head_dim": 16}  # not hidden_size / heads


def _rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": values}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model: the name in its config.json, and the settings that make it that kind."""

    model_type: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


_LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
_QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LLAMA4 = {
    "intermediate_size_mlp": 56,
    "num_local_experts": 4,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 5,
    "floor_scale": 4,
} | H16
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": 8,  # as transformers has it: the rotated channels
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_IMAGES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, Kind] = {
    "Llama 2": Kind("llama", {"num_key_value_heads": 4}),
    "Llama 3": Kind("llama", _rope(rope_type="default", rope_theta=500000.0)),
    "Llama 3.1": Kind("llama", {"rope_parameters": LLAMA3} | H16),
    "Llama 3.2, tied": Kind("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama, linear RoPE": Kind("llama", _rope(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "Llama, dynamic RoPE": Kind("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "Llama, YaRN": Kind("llama", {"rope_parameters": YARN}),
    "Llama, biases": Kind("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "SmolLM2": Kind("llama", {"num_attention_heads": 6, "tie_word_embeddings": True}),
    "SmolLM3, tied": Kind("smollm3", {"no_rope_layers": [1, 0]}),
    "SmolLM3, windows": Kind(
        "smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "tie_word_embeddings": False} | WINDOW
    ),
    "Mistral 7B v0.1": Kind("mistral", WINDOW),
    "Mistral 7B v0.3": Kind("mistral", {"sliding_window": None}),
    "Mistral NeMo": Kind("mistral", {"sliding_window": None} | H16),
    "Ministral, windows in all layers": Kind("ministral", WINDOW | H16),
    "Ministral, windows in some layers": Kind("ministral", WINDOW | TYPES | H16),
    "Qwen2.5, tied": Kind("qwen2", {"tie_word_embeddings": True}),
    "Qwen2.5": Kind("qwen2", _rope(rope_type="default", rope_theta=1000000.0)),
    "Qwen2.5, windows": Kind("qwen2", {"use_sliding_window": True, "max_window_layers": 1} | WINDOW),
    "Qwen2.5, YaRN": Kind("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.2, "beta_fast": 16.0}}),
    "Qwen3, tied": Kind("qwen3", {"tie_word_embeddings": True} | H16),
    "Qwen3, windows": Kind("qwen3", {"use_sliding_window": True} | WINDOW | TYPES | H16),
    "Gemma": Kind("gemma", H16),
    "Gemma 2": Kind("gemma2", {"query_pre_attn_scalar": 24} | WINDOW | H16),
    "Gemma 2, untied": Kind("gemma2", {"tie_word_embeddings": False} | WINDOW | H16),
    "Gemma 3": Kind("gemma3_text", {"query_pre_attn_scalar": 24} | WINDOW | TYPES | H16),
    "Gemma 3, its text part": Kind(
        "gemma3",
        {"text_config": TINY | {"query_pre_attn_scalar": 16} | WINDOW | TYPES | H16, "vision_config": _IMAGES},
    ),
    "Phi-1, Phi-1.5, Phi-2": Kind("phi"),
    "Phi-3": Kind("phi3", {"sliding_window": 7}),
    "Phi-3 128k, Phi-4-mini (LongRoPE)": Kind("phi3", _LONG),
    "OLMo": Kind("olmo"),
    "OLMo 2": Kind("olmo2"),
    "OLMo 3": Kind("olmo3", WINDOW | TYPES),
    "OLMo 3, YaRN": Kind(
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}} | WINDOW | TYPES,
    ),
    "Granite 3": Kind(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "EXAONE 4": Kind("exaone4", WINDOW | TYPES),
    "StarCoder2": Kind("starcoder2", WINDOW),
    "StableLM": Kind("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "StableLM, parallel": Kind("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "Command R": Kind("cohere"),
    "Command R+": Kind("cohere", {"use_qk_norm": True, "tie_word_embeddings": False}),
    "Command R7B": Kind("cohere2", WINDOW | TYPES),
    "GLM-4": Kind("glm", H16),
    "GLM-4-0414": Kind("glm4", H16),
    "Helium": Kind("helium", {"head_dim": 12}),
    "Arcee": Kind("arcee"),
    "Nemotron": Kind("nemotron"),
    "Seed-OSS": Kind("seed_oss", H16),
    "Mixtral": Kind("mixtral", {"num_local_experts": 5}),
    "Mixtral, windows, tied": Kind("mixtral", {"num_local_experts": 4, "tie_word_embeddings": True} | WINDOW | H16),
    "Qwen3-MoE": Kind("qwen3_moe", {"norm_topk_prob": True} | _QWEN3_MOE | H16),
    "Qwen3-MoE, dense layers": Kind(
        "qwen3_moe", {"mlp_only_layers": [2], "decoder_sparse_step": 2, "num_hidden_layers": 4} | _QWEN3_MOE
    ),
    "gpt-oss": Kind(
        "gpt_oss",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "swiglu_limit": 0.6,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        }
        | WINDOW
        | H16,
    ),
    "Llama 4, text": Kind("llama4_text", _LLAMA4),
    "Llama 4, text, dense layers": Kind(
        "llama4_text",
        _LLAMA4
        | {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}
        | {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2, "use_qk_norm": False, "floor_scale": 64},
    ),
    "DeepSeek-V3": Kind("deepseek_v3", _DEEPSEEK),
    "DeepSeek-V3, YaRN": Kind(
        "deepseek_v3",
        _DEEPSEEK
        | {"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.0}},
    ),
    "Hunyuan dense": Kind("hunyuan_v1_dense", {"rope_parameters": DYNAMIC | {"alpha": 1000.0}} | H16),
}


def write_kind(kind: Kind, directory: pathlib.Path) -> Any:
    """Writes a random checkpoint of the kind, and returns transformers' model of it."""
    config = transformers.AutoConfig.for_model(kind.model_type, **TINY | kind.settings)
    config.eos_token_id = None  # GLM's own ones lie outside the vocabulary
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        biases = [(name, values) for name, values in model.named_buffers() if name.endswith("correction_bias")]
        for name, values in [*model.named_parameters(), *biases]:
            # Large enough for sharp attention; norms and biases differ from their initial ones and zeros.
            values.copy_(torch.randn_like(values) * 0.25 + ("norm" in name and "bias" not in name))
    model.save_pretrained(directory)
    return model
