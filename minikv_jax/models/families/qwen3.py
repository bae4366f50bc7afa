"""Qwen3 (arXiv 2505.09388): norms of queries and keys in place of Qwen2's biases, and a head size of its own."""

from minikv_jax.models.families.qwen2 import windows
from minikv_jax.models.family import Family

FAMILY = Family(
    model_type="qwen3",
    defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    switches=("attention_bias",),
    qk_norm=True,
    windows=windows,
    gguf_architecture="qwen3",
)
