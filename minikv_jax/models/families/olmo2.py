"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP, and over all queries and all keys."""

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 2048
    rms_norm_eps: bounds.Epsilon = 1e-5
    attention_bias: bool | None = False


DESIGN = Design(pre_norms=False, post_norms=True, qk_norm="projection")
NAMES = {"post_attention_layernorm": "attention_output_norm", "post_feedforward_layernorm": "mlp_output_norm"}

FAMILY = family.Family(
    model_type="olmo2",
    fields=Fields,
    design=DESIGN,
    names=NAMES,
    gguf=family.Gguf(architecture="olmo2"),
)
