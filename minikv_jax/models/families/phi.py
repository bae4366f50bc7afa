"""Phi-1, Phi-1.5 and Phi-2 (arXiv 2309.05463): LayerNorm, attention and MLP in parallel, biases everywhere."""

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    hidden_act: bounds.Activation = "gelu_new"
    max_position_embeddings: bounds.Positions = 2048
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="layer_norm_eps")
    partial_rotary_factor: bounds.Share | None = None
    qk_layernorm: bounds.Off = False


FAMILY = family.Family(
    model_type="phi",
    fields=Fields,
    design=Design(norm="layer_norm", parallel=True, gated_mlp=False, head_bias=True),
    settings=lambda fields: {"attention_bias": True, "mlp_bias": True},
    names={
        "final_layernorm": "norm",
        "self_attn.dense": "self_attn.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    rotary_share=0.5,
    gguf=family.Gguf(architecture="phi2"),
)
