"""Qwen3 (arXiv 2505.09388): norms of queries and keys in place of Qwen2's biases, and a head size of its own."""

from minikv_jax.models import bounds, family
from minikv_jax.models.families import qwen2


class Fields(qwen2.Fields):
    """What a config.json may hold beside Qwen2's fields."""

    head_dim: bounds.Width | None = 128
    attention_bias: bool | None = False


FAMILY = family.Family(
    model_type="qwen3", fields=Fields, qk_norm=True, windows=qwen2.windows, gguf_architecture="qwen3"
)
