"""gpt-oss (arXiv 2508.10925): experts with a clamped SwiGLU, attention sinks, windows in every other layer, YaRN."""

from typing import Any, Literal

from pydantic import model_validator

from minikv_jax.models import bounds, family
from minikv_jax.models.design import Design
from minikv_jax.models.experts import Count, Experts, Stack
from minikv_jax.schemas import Schema

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class Mxfp4(Schema, extra="ignore"):
    """The quantisation of the published checkpoints: the experts' matrices are in mxfp4, and dequantised."""

    quant_method: Literal["mxfp4"]


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    max_position_embeddings: bounds.Positions = 131072
    rms_norm_eps: bounds.Epsilon = 1e-5
    head_dim: bounds.Width | None = 64
    attention_bias: bool | None = True
    sliding_window: bounds.Positions | None = 128
    layer_types: bounds.LayerTypes | None = None
    num_local_experts: Count = 128
    num_experts_per_tok: Count | None = None
    experts_per_token: Count | None = None
    swiglu_alpha: bounds.Multiplier = 1.702
    swiglu_limit: bounds.Multiplier = 7.0
    initial_context_length: bounds.Positions | None = None  # repeated in the rotary settings
    quantization_config: Mxfp4 | None = None

    @model_validator(mode="before")
    @classmethod
    def _rotate(cls, data: Any) -> Any:
        """Adds the rotary settings of the published models if a file gives none."""
        given = isinstance(data, dict) and (data.get("rope_parameters") or data.get("rope_scaling"))
        return data if given or not isinstance(data, dict) else data | {"rope_parameters": _YARN}


def windows(fields: Fields) -> family.Windows:
    """Returns the window, which applies to every other layer from the first on unless `layer_types` says otherwise."""
    return family.layer_windows(fields.sliding_window, fields.layer_types or family.every(2, fields.num_hidden_layers))


def settings(fields: Fields) -> dict[str, Any]:
    """Returns the experts, whose weights are a softmax over the chosen ones."""
    experts = Experts(
        count=fields.num_local_experts,
        per_token=family.one_of(fields, "num_experts_per_tok", "experts_per_token", default=4),
        intermediate_size=fields.intermediate_size,
        scoring="softmax_of_chosen",
        router_bias=True,
        bias=True,
        swiglu_limit=fields.swiglu_limit,
        swiglu_alpha=fields.swiglu_alpha,
    )
    return {"experts": experts}


_EXPERTS = r"(model\.layers\.\d+\.mlp\.experts)\."
_PARTS = (r"\1.{expert}.gate_proj.", r"\1.{expert}.up_proj.")
FAMILY = family.Family(
    model_type="gpt_oss",
    fields=Fields,
    design=Design(attention_sinks=True),
    windows=windows,
    settings=settings,
    rope_theta=150000.0,
    stacks=(
        Stack(_EXPERTS + "gate_up_proj", tuple(part + "weight" for part in _PARTS), transposed=True, alternating=True),
        Stack(_EXPERTS + "gate_up_proj_bias", tuple(part + "bias" for part in _PARTS), alternating=True),
        Stack(_EXPERTS + "down_proj", (r"\1.{expert}.down_proj.weight",), transposed=True),
        Stack(_EXPERTS + "down_proj_bias", (r"\1.{expert}.down_proj.bias",)),
    ),
)
