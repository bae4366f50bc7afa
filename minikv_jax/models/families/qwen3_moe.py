"""Qwen3 mixtures of experts (arXiv 2505.09388): Qwen3 with experts in place of the MLP of most layers."""

from typing import Annotated, Any

from pydantic import Field

from minikv_jax.models import bounds, family, gguf_settings
from minikv_jax.models.design import Design
from minikv_jax.models.experts import Count, Experts


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 32768
    attention_bias: bool | None = False
    use_sliding_window: bool | None = False
    sliding_window: bounds.Positions | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] | None = None  # not read by transformers: all layers have the window
    num_experts: Count | None = None
    num_local_experts: Count | None = None  # the name in files of transformers 5
    num_experts_per_tok: Count = 8
    moe_intermediate_size: bounds.Width = 768
    norm_topk_prob: bool | None = False
    decoder_sparse_step: Annotated[int, Field(ge=1, le=1 << 12)] = 1
    mlp_only_layers: bounds.LayerNumbers | None = None


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to every layer if `use_sliding_window` is true."""
    return (fields.sliding_window if fields.use_sliding_window else None), None


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the experts: in each `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    layers, dense = range(fields.num_hidden_layers), fields.mlp_only_layers or ()
    experts = Experts(
        count=family.one_of(fields, "num_experts", "num_local_experts", default=128),
        per_token=fields.num_experts_per_tok,
        intermediate_size=fields.moe_intermediate_size,
        normalised=bool(fields.norm_topk_prob),
        dense_layers=tuple(n for n in layers if n in dense or (n + 1) % fields.decoder_sparse_step),
    )
    return {"experts": experts}


FAMILY = family.Family(
    model_type="qwen3_moe",
    fields=Fields,
    design=Design(qk_norm="head"),
    windows=windows,
    settings=settings,
    gguf=family.Gguf(architecture="qwen3moe", reads=("expert_count",), settings=gguf_settings.experts),
)
