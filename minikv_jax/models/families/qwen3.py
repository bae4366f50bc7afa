"""Qwen3 (arXiv 2505.09388): Qwen2 with query and key norms instead of biases, and an independent head size."""

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design
from minikv_jax.models.families import qwen2


class Fields(qwen2.Fields):
    """Fields of a config.json in addition to those of Qwen2."""

    head_dim: bounds.Width | None = 128
    attention_bias: bool | None = False


FAMILY = family.Family(
    model_type="qwen3",
    fields=Fields,
    design=Design(qk_norm="head"),
    windows=qwen2.windows,
    gguf=family.Gguf(architecture="qwen3"),
)
