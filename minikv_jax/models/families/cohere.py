"""Command R (Cohere): LayerNorm without bias, attention and MLP in parallel, scaled logits."""

import dataclasses
from collections.abc import Collection
from typing import Any

from pydantic import Field

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 8192
    rms_norm_eps: bounds.Epsilon = Field(1e-5, alias="layer_norm_eps")
    tie_word_embeddings: bool | None = True
    attention_bias: bool | None = False
    logit_scale: bounds.Multiplier | None = 0.0625
    use_qk_norm: bool | None = False


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the factor of the logits, and the norms of queries and keys of the larger model."""
    design = dataclasses.replace(FAMILY.design, qk_norm="each_head" if fields.use_qk_norm else None)
    return {"logit_multiplier": fields.logit_scale or 1.0, "own_design": design}


def gguf_settings(values: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Returns the factor of the logits, and the norms of queries and keys if there are any."""
    design = dataclasses.replace(FAMILY.design, qk_norm="each_head" if "blk.0.attn_q_norm.weight" in tensors else None)
    return {"logit_multiplier": values.logit_scale or 1.0, "own_design": design}


FAMILY = family.Family(
    model_type="cohere",
    fields=Fields,
    design=Design(norm="layer_norm_no_bias", parallel=True),
    settings=settings,
    rope_theta=500000.0,
    rope_interleaved=True,
    gguf=family.Gguf(architecture="command-r", interleaved=True, reads=("logit_scale",), settings=gguf_settings),
)
