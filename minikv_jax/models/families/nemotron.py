"""Nemotron-4 and Minitron (arXiv 2402.16819): LayerNorm with one plus the weight, squared ReLU, half rotated."""

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    hidden_act: bounds.Activation = "relu2"
    max_position_embeddings: bounds.Positions = 4096
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="norm_eps")
    partial_rotary_factor: bounds.Share | None = None
    attention_bias: bool | None = False
    mlp_bias: bool | None = False


FAMILY = family.Family(
    model_type="nemotron",
    fields=Fields,
    design=Design(norm="layer_norm_1p", gated_mlp=False),
    rotary_share=0.5,
    gguf=family.Gguf(architecture="nemotron", plus_one=True),
)
