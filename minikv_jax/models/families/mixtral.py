"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in place of the MLP."""

from typing import Any

from minikv_jax.models import bounds, family, gguf_settings
from minikv_jax.models.experts import Count, Experts


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    rms_norm_eps: bounds.Epsilon = 1e-5
    sliding_window: bounds.Positions | None = None
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2
    router_jitter_noise: float = 0.0  # in training


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the experts, whose weights add up to 1."""
    experts = Experts(
        count=fields.num_local_experts,
        per_token=fields.num_experts_per_tok,
        intermediate_size=fields.intermediate_size,
        normalised=True,
    )
    return {"experts": experts}


FAMILY = family.Family(
    model_type="mixtral",
    fields=Fields,
    windows=family.same_window,
    settings=settings,
    rope_theta=1000000.0,
    names={
        "block_sparse_moe.gate": "mlp.router_proj",
        "block_sparse_moe.experts.*.w1": "mlp.experts.*.gate_proj",
        "block_sparse_moe.experts.*.w2": "mlp.experts.*.down_proj",
        "block_sparse_moe.experts.*.w3": "mlp.experts.*.up_proj",
    },
    gguf=family.Gguf(architecture="llama", interleaved=True, reads=("expert_count",), settings=gguf_settings.experts),
)
