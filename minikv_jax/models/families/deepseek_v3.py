"""DeepSeek-V3 and R1 (arXiv 2412.19437): multi-head latent attention, and experts chosen by group."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Latent
from minikv_jax.models.experts import Count, Experts


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 4096
    attention_bias: bool | None = False
    rope_interleave: bool | None = True
    q_lora_rank: bounds.Width | None = 1536
    kv_lora_rank: bounds.Width = 512
    qk_nope_head_dim: bounds.Width = 128
    qk_rope_head_dim: bounds.Width = 64
    qk_head_dim: bounds.Width | None = None  # the sum of the two
    v_head_dim: bounds.Width = 128
    n_routed_experts: Count | None = None
    num_local_experts: Count | None = None  # the name in files of transformers 5
    n_shared_experts: Count = 1
    num_experts_per_tok: Count = 8
    moe_intermediate_size: bounds.Width = 2048
    first_k_dense_replace: Annotated[int, Field(ge=0, le=1 << 12)] = 3
    moe_layer_freq: Annotated[int, Field(ge=1, le=1)] = 1
    n_group: Count = 8
    topk_group: Count = 4
    topk_method: Literal["noaux_tc"] | None = None
    scoring_func: Literal["sigmoid"] | None = None
    norm_topk_prob: bool | None = True
    routed_scaling_factor: bounds.Multiplier = 2.5
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1)] | None = None
    num_mtp_layers: Annotated[int, Field(ge=0, le=1)] | None = None
    ep_size: int | None = None
    seq_aux: bool | None = None
    aux_loss_alpha: float | None = None


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the sizes of the attention, its scale, and the experts."""
    head_dim = fields.qk_nope_head_dim + fields.qk_rope_head_dim
    experts = Experts(
        count=family.one_of(fields, "n_routed_experts", "num_local_experts", default=256),
        per_token=fields.num_experts_per_tok,
        intermediate_size=fields.moe_intermediate_size,
        shared_size=fields.moe_intermediate_size * fields.n_shared_experts,
        dense_layers=tuple(range(min(fields.first_k_dense_replace, fields.num_hidden_layers))),
        scoring="sigmoid",
        normalised=bool(fields.norm_topk_prob),
        scale=fields.routed_scaling_factor,
        groups=fields.n_group,
        chosen_groups=fields.topk_group,
        correction_bias=True,
    )
    latent = Latent(
        query_rank=fields.q_lora_rank or 0,
        kv_rank=fields.kv_lora_rank,
        value_dim=fields.v_head_dim,
        interleaved=bool(fields.rope_interleave),
    )
    return {
        "head_dim": head_dim,
        "rotary_dim": fields.qk_rope_head_dim,
        "attention_multiplier": _yarn_size(fields) ** 2 * head_dim**-0.5,
        "experts": experts,
        "latent": latent,
    }


def _yarn_size(fields: Fields) -> float:
    """Returns YaRN's factor of queries and keys, which here applies to all channels."""
    rope = fields.rope_scaling or fields.rope_parameters
    if not isinstance(rope, family.RopeFields) or (rope.rope_type or rope.type or "default") == "default":
        return 1.0
    if rope.factor is None or rope.factor <= 1 or not rope.mscale_all_dim:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0


FAMILY = family.Family(
    model_type="deepseek_v3",
    fields=Fields,
    settings=settings,
    names={
        "self_attn.q_proj": "self_attn.q_b_proj",
        "self_attn.q_a_layernorm": "self_attn.q_a_norm",
        "self_attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj",
        "self_attn.kv_a_layernorm": "self_attn.kv_a_norm",
    },
    predicts_further=True,
)
