"""Arcee's AFM-4.5B: Llama with a squared ReLU and no gate in the MLP."""

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    hidden_act: bounds.Activation = "relu2"
    max_position_embeddings: bounds.Positions = 4096
    rms_norm_eps: bounds.Epsilon = 1e-5
    attention_bias: bool | None = False
    mlp_bias: bool | None = False


FAMILY = family.Family(
    model_type="arcee",
    fields=Fields,
    design=Design(gated_mlp=False),
    gguf=family.Gguf(architecture="arcee", interleaved=True),
)
