"""Checks the keys of a config.json that its family does not read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Literal

from minikv_jax import checks, schemas
from minikv_jax.models import bounds

# They describe training, files, tokens or generation, or choose among implementations of the same computation.
WITHOUT_EFFECT = frozenset(
    """
    architectures auto_map cache_implementation custom_pipelines dtype finetuning_task id2label is_llama_config
    label2id class_num dense_list license model_max_length model_type name_or_path pool_type problem_type
    task_specific_params tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed
    unsloth_version
    attention_dropout attn_pdrop embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob initializer_range
    initializer_factor output_router_logits pretraining_tp resid_pdrop residual_dropout router_aux_loss_coef
    bos_token bos_token_id boi_token_index decoder_start_token_id eod_token_id eoi_token_index eos_token
    forced_bos_token_id forced_eos_token_id im_end_id im_newline_id im_start_id image_token_index mask_init_id
    org_vocab_size pad_id pad_token pad_token_id sep_token_id text_end_id text_start_id unk_token_id
    use_embedding_sharing use_parallel_embedding
    attn_implementation chunk_size_feed_forward flash_attention fused_mlp fused_norm gradient_checkpointing
    is_decoder output_attentions output_hidden_states pruned_heads return_dict tf_legacy_loss tie_encoder_decoder
    torchscript use_bfloat16 use_cache use_flash_attention use_flash_attn
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)


class Settings(schemas.Schema, extra="ignore"):
    """Settings of other families, which are accepted if they are off."""

    quantization_config: None = None
    compression_config: None = None
    partial_rotary_factor: bounds.One = None
    rotary_pct: bounds.One = None
    embedding_multiplier: bounds.One = None
    residual_multiplier: bounds.One = None
    logits_scaling: bounds.One = None
    logit_scale: bounds.One = None
    scale_emb: bounds.One = None
    attention_multiplier: float | None = None  # replaces head_dim ** -0.5
    query_pre_attn_scalar: float | None = None  # replaces head_dim
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    clip_qkv: None = None
    attention_chunk_size: None = None
    scale_depth: None = None
    dim_model_base: None = None
    no_rope_layers: list[Literal[1]] | None = None
    no_rope_layer_interval: None = None
    use_qk_norm: bounds.Off = None
    qk_layernorm: bounds.Off = None
    attn_temperature_tuning: bounds.Off = None
    rope_interleave: bounds.Off = None
    use_parallel_residual: bounds.Off = None
    parallel_attn: bounds.Off = None
    alibi: bounds.Off = None
    add_cross_attention: bounds.Off = None
    is_encoder_decoder: bounds.Off = None
    use_bidirectional_attention: bounds.Off = None


def check(given: Mapping[str, Any], known: Collection[str], source: str | os.PathLike[str]) -> Settings:
    """Checks the keys of a config.json that its family does not read.

    Keys without effect, keys with a leading underscore, and settings that are off are accepted, whatever the family.

    Args:
      given: the content of the file.
      known: the keys that the family reads.
      source: the file, for errors.

    Returns:
      The settings of other families.

    Raises:
      ValueError: a key that asks for a computation of another family, or that is not known at all.
    """
    others = {key: value for key, value in given.items() if key not in known and key not in WITHOUT_EFFECT}
    settings = schemas.validate(Settings, others, source=source)
    unknown = {
        key: value
        for key, value in others.items()
        if not key.startswith("_") and key not in Settings.model_fields and value not in (None, False)
    }
    if unknown:
        listed = checks.listed([f"{checks.shown(key)}: {checks.shown(value)}" for key, value in unknown.items()])
        raise ValueError(
            f"{checks.printable(os.fspath(source))}: {listed}: not known for model_type "
            f"{checks.shown(given.get('model_type'))}, and may change the logits; remove a key that does not"
        )
    return settings
