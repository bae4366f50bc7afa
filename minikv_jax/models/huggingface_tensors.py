"""Names of tensors in Hugging Face checkpoints, and those that hold several projections."""

from __future__ import annotations

import re
from collections.abc import Iterable

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.fused import Parts
from minikv_jax.models.projections import JOINED, joined
from minikv_jax.models.tensors import Rule

_LAYER = r"model\.layers\.(\d+)\."
_RULES = (
    Rule(r"model\.embed_tokens\.weight", "embed_tokens.embedding"),
    Rule(r"model\.norm\.weight", "norm.scale"),
    Rule(r"model\.norm\.bias", "norm.bias"),
    Rule(r"lm_head\.weight", "lm_head.kernel"),
    Rule(r"lm_head\.bias", "lm_head.bias"),
    Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight", r"layers.\1.\2.scale"),
    Rule(_LAYER + r"(input_layernorm|post_attention_layernorm)\.bias", r"layers.\1.\2.bias"),
    Rule(_LAYER + r"self_attn\.([qk]_norm)\.weight", r"layers.\1.self_attn.\2.scale"),
    Rule(_LAYER + r"(self_attn|mlp)\.(\w+_proj)\.weight", r"layers.\1.\2.\3.kernel"),
    Rule(_LAYER + r"(self_attn|mlp)\.(\w+_proj)\.bias", r"layers.\1.\2.\3.bias"),
    Rule(_LAYER + r"self_attn\.sinks", r"layers.\1.self_attn.sink_logits"),
    Rule(_LAYER + r"mlp\.(?:gate|router)\.weight", r"layers.\1.mlp.router_proj.kernel"),
    Rule(_LAYER + r"mlp\.router\.bias", r"layers.\1.mlp.router_proj.bias"),
    Rule(_LAYER + r"mlp\.gate\.e_score_correction_bias", r"layers.\1.mlp.correction_bias"),
    Rule(_LAYER + r"mlp\.experts\.(\d+)\.(\w+_proj)\.weight", r"layers.\1.mlp.experts.\2.\3.kernel"),
    Rule(_LAYER + r"mlp\.experts\.(\d+)\.(\w+_proj)\.bias", r"layers.\1.mlp.experts.\2.\3.bias"),
    Rule(_LAYER + r"mlp\.shared_experts?\.(\w+_proj)\.weight", r"layers.\1.mlp.shared_expert.\2.kernel"),
    Rule(r"model\.rotary_emb\.inv_freq", None),  # of older files; computed from the config
    Rule(_LAYER + r"self_attn\.rotary_emb\.inv_freq", None),
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rules of a model's family: its own names (`Family.names`) before those of Llama."""
    own: list[Rule] = []
    for theirs, ours in config.family.names.items():
        before, to = (r"model\.", ours) if ours == "norm" else (_LAYER, rf"layers.\1.{ours}".replace("*", r"\2"))
        pattern = re.escape(theirs).replace(r"\*", r"(\d+)")
        weight = "kernel" if ours.endswith("_proj") else "scale"
        own += [
            Rule(rf"{before}{pattern}\.{name}", f"{to}.{kind}") for name, kind in (("weight", weight), ("bias", "bias"))
        ]
    if config.family.predicts_further:
        own.append(Rule(rf"model\.layers\.{config.num_hidden_layers}\..*", None))
    return (*own, *_RULES)


def fused(config: ModelConfig, names: Iterable[str]) -> dict[str, Parts]:
    """Returns the tensors that hold several projections (`qkv_proj`, `gate_up_proj`), with their parts."""
    found: dict[str, Parts] = {}
    for name in names:
        if match := re.fullmatch(r"(.*\.(?:self_attn|mlp))\.(qkv_proj|gate_up_proj)\.(weight|bias)", name):
            module, projection, kind = match.groups()
            parts = (f"{module}.{part}.{kind}" for part in JOINED[projection])
            found[name] = dict(zip(parts, joined(config, projection).sizes, strict=True))
    return found
