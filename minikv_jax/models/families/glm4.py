"""GLM-4-0414: GLM-4 with norms on both sides of attention and MLP."""

import dataclasses
from typing import Any

from minikv_jax.models import family
from minikv_jax.models.design import Design
from minikv_jax.models.families import glm


def settings(fields: glm.Fields) -> dict[str, Any]:
    """Returns the biases, which the output projection does not have."""
    design = dataclasses.replace(FAMILY.design, qkv_bias=bool(fields.attention_bias))
    return {"own_design": design, "attention_bias": False}


FAMILY = family.Family(
    model_type="glm4",
    fields=glm.Fields,
    design=Design(post_norms=True),
    settings=settings,
    names={"post_self_attn_layernorm": "attention_output_norm", "post_mlp_layernorm": "mlp_output_norm"},
    rope_interleaved=True,
    rotary_share=0.5,
    gguf=family.Gguf(architecture="glm4", interleaved=True),
)
