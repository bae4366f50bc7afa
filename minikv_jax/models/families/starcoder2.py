"""StarCoder2 (arXiv 2402.19173): LayerNorm, an MLP without a gate, and biases."""

from typing import Any, Literal

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 2
    hidden_act: bounds.Activation = "gelu_pytorch_tanh"
    max_position_embeddings: bounds.Positions = 4096
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="norm_epsilon")
    tie_word_embeddings: bool | None = True
    sliding_window: bounds.Positions | None = None
    use_bias: bool = True
    mlp_type: Literal["default"] | None = None
    norm_type: Literal["layer_norm"] | None = None


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the biases."""
    return {"attention_bias": fields.use_bias, "mlp_bias": fields.use_bias}


FAMILY = family.Family(
    model_type="starcoder2",
    fields=Fields,
    design=Design(norm="layer_norm", gated_mlp=False),
    windows=family.same_window,
    settings=settings,
    names={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    gguf=family.Gguf(architecture="starcoder2"),
)
