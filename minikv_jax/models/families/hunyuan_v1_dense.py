"""Hunyuan dense (Tencent): Llama with norms of queries and keys after the rotation."""

from typing import Literal

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 2048
    rms_norm_eps: bounds.Epsilon = 1e-5
    attention_bias: bool | None = False
    attention_head_dim: bounds.Width | None = None  # not read by transformers
    cla_share_factor: int | None = None  # of `use_cla`
    norm_type: Literal["rms"] | None = None
    use_cla: bounds.Off = None
    use_qk_norm: Literal[True] | None = None
    use_rotary_pos_emb: Literal[True] | None = None


FAMILY = family.Family(
    model_type="hunyuan_v1_dense",
    fields=Fields,
    design=Design(qk_norm="head", qk_norm_after_rope=True),
    names={"self_attn.query_layernorm": "self_attn.q_norm", "self_attn.key_layernorm": "self_attn.k_norm"},
    gguf=family.Gguf(architecture="hunyuan-dense"),
)
