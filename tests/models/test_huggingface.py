"""Tests models in Hugging Face directories: configs, safetensors, and refusals."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from support.checkpoints import assert_holds, random_tensors, write_hf
from support.tiny import tiny_config

from minikv_jax.models.config import RopeScaling
from minikv_jax.models.huggingface import config_from_hf, load_safetensors

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type} | SHAPE | changes


def test_llama2_leaves_head_dim_to_be_derived():
    config = config_from_hf(hf(max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=2))
    assert config.head_dim == 12
    assert config.rope_theta == 10000.0
    assert config.rope_scaling is None
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    assert [config.window(layer) for layer in range(3)] == [None] * 3


def test_llama_without_key_value_heads_has_one_per_query_head():
    raw = hf()
    del raw["num_key_value_heads"]
    assert config_from_hf(raw).num_key_value_heads == 4


def test_llama3_scaling_in_the_old_and_the_new_spelling():
    old = config_from_hf(hf(rope_theta=500000.0, rope_scaling=LLAMA31_ROPE))
    new = config_from_hf(hf(rope_parameters=LLAMA31_ROPE | {"rope_theta": 500000}))
    assert old == new
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == RopeScaling(**LLAMA31_ROPE)


def test_llama3_scaling_falls_back_to_the_positions_of_the_model():
    rope = {key: value for key, value in LLAMA31_ROPE.items() if key != "original_max_position_embeddings"}
    scaling = config_from_hf(hf(rope_scaling=rope, max_position_embeddings=4096)).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 4096


def test_linear_scaling_under_its_older_key():
    config = config_from_hf(hf(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_mistral_has_a_window_unless_the_config_says_null():
    assert config_from_hf(hf("mistral", sliding_window=8)).window(1) == 8
    assert config_from_hf(hf("mistral", sliding_window=None)).window(1) is None
    assert config_from_hf(hf("mistral")).window(1) == 4096


def test_qwen2_has_biases_and_a_window_only_when_switched_on():
    config = config_from_hf(hf("qwen2", sliding_window=8, max_window_layers=1))
    assert config.qkv_bias
    assert not config.attention_bias
    assert [config.window(layer) for layer in range(3)] == [None] * 3


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows_begin_at_max_window_layers(model_type: str):
    raw = hf(model_type, sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert [config_from_hf(raw).window(layer) for layer in range(3)] == [None, 8, 8]


def test_qwen_layer_types_win_over_max_window_layers():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    raw = hf("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=3, layer_types=types)
    assert [config_from_hf(raw).window(layer) for layer in range(3)] == [8, None, 8]


def test_qwen3_normalises_queries_and_keys_and_defaults_its_head_dim():
    config = config_from_hf(hf("qwen3"))
    assert config.design.qk_norm == "head"
    assert not config.qkv_bias
    assert config.head_dim == 128


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_agree_with_transformers(model_type: str):
    theirs = transformers.AutoConfig.for_model(model_type, **SHAPE)
    ours = config_from_hf(hf(model_type, eos_token_id=theirs.eos_token_id))
    assert ours == config_from_hf(theirs.to_dict())


def test_directory_takes_stop_tokens_from_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf(eos_token_id=1)))
    assert config_from_hf(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert config_from_hf(tmp_path).eos_token_ids == (3, 5)
    assert config_from_hf(tmp_path / "config.json").eos_token_ids == (3, 5)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (hf("gpt2"), "model_type='gpt2': expected one of .*llama, .*mistral, .*qwen2, qwen3"),
        ({"hidden_size": 4}, "model_type=None: expected one of"),
        ({"model_type": "llama", "hidden_size": 48}, "the config lacks vocab_size, intermediate_size"),
        (hf(hidden_act="swiglu"), "hidden_act is 'swiglu'; accepted: 'silu', 'gelu'"),
        (
            hf(rope_scaling={"rope_type": "mrope", "factor": 4.0, "sections": 32}),
            "rope_scaling.rope_type is 'mrope'; accepted: 'default', 'lin.* .and 1 more.",
        ),
        (hf(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "needs low_freq_factor, high_freq_factor"),
        (hf(rope_scaling={"type": "linear", "factor": 0.0}), "rope_scaling.factor is 0.0; accepted: at least 1e-06"),
        (
            hf(rope_parameters={"full_attention": {"rope_theta": 1.0}}),
            "rope_parameters differ by type of layer",
        ),
        (hf(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; accepted: 1, which changes nothing"),
        (hf(logits_scaling=8.0), "logits_scaling is 8.0; accepted: 1, which changes nothing"),
        (hf(residual_multiplier=float("nan")), "residual_multiplier is nan; accepted: a finite number"),
        (hf(embedding_multiplier="2"), "embedding_multiplier is '2'; accepted: a number"),
        (hf(attention_multiplier=0.5), "attention_multiplier is 0.5; accepted: 0.288"),
        (hf(query_pre_attn_scalar=256), "query_pre_attn_scalar is 256.0; accepted: 12, which head_dim=12 gives"),
        (hf(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0; accepted: null"),
        (hf(no_rope_layers=[1, 1, 0]), r"no_rope_layers\[2\] is 0; accepted: 1"),
        (
            hf(window_of_heads=3, deepnorm=True, _note=1, off=None),
            "'window_of_heads': 3, 'deepnorm': True: not known for",
        ),
        (hf("mistral", attention_bias=True), "'attention_bias': True: not known for model_type 'mistral'"),
        (hf(sliding_window=8), "'sliding_window': 8: not known for model_type 'llama', and may change the logits"),
        (hf("gemma2", rope_interleave=True), "rope_interleave is True; accepted: False"),
        (hf("granite", logits_scaling=0.0), "logits_scaling is 0.0; accepted: at least 1e-06"),
        (hf("phi", qk_layernorm=True), "qk_layernorm is True; accepted: False"),
        (hf("seed_oss", attention_bias=False, attention_out_bias=True), "attention_out_bias is True; accepted: False"),
        (hf("exaone4", sliding_window_pattern="LLLG"), "sliding_window_pattern is 'LLLG'; accepted: layer_types"),
        (hf("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear"}}), "accepted: 'default'"),
        (hf(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "needs short_factor, long_factor"),
        (hf(use_qk_norm=True), "use_qk_norm is True; accepted: False"),
        (hf(rope_scaling={"rope_type": "default", "mrope_section": [2]}), "rope_scaling: unknown keys 'mrope_section'"),
        (
            hf(rope_parameters={"rope_theta": 5.0}, rope_scaling={"type": "linear", "factor": 2}),
            "rope_parameters give rope_theta=5.0, None, and rope_scaling rope_theta=1.*accepted: one",
        ),
        (hf(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}; accepted: null"),
        (hf(num_key_value_heads=3), "num_attention_heads=4.*num_key_value_heads=3"),
        (hf(head_dim=7), "head_dim=7 must be even"),
        (hf(num_hidden_layers=0), "num_hidden_layers is 0; accepted: at least 1"),
        (hf(vocab_size="many"), "vocab_size is 'many'; accepted: an integer"),
        (hf(rms_norm_eps=0.0), "rms_norm_eps is 0.0; accepted: at least 1e-20"),
        (hf(rope_theta="1e4"), "rope_theta is '1e4'; accepted: a number"),
        (hf(eos_token_id=96), r"eos_token_ids=\(96,\) must lie in 0..95"),
        (hf("mistral", sliding_window=0), "sliding_window is 0; accepted: at least 1"),
        (hf("qwen2", layer_types=["sliding_attention"] * 3), "use_sliding_window=False"),
        (
            hf(
                "qwen2",
                use_sliding_window=True,
                layer_types=["sliding_attention", "linear_attention", "linear_attention"],
            ),
            r"layer_types\[1\] is 'linear_attention'; accepted: 'full_attention' or 'sliding_attention' \(and 1 more\)",
        ),
        (
            hf("qwen2", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]),
            "names 2 layers, num_hidden_layers=3",
        ),
        (hf(max_position_embeddings=64) | {"num_key_value_heads": 0}, "num_key_value_heads is 0; accepted: at least 1"),
        (hf(max_position_embeddings=64, head_dim=0), "head_dim is 0; accepted: at least 1"),
        (hf(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; accepted: true or false"),
        (hf(eos_token_id=2.5), "eos_token_id is 2.5; accepted: an integer or a list"),
        (hf(rope_scaling="x"), "rope_scaling is 'x'; accepted: an object"),
    ],
)
def test_what_is_not_supported_is_named(raw: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config_from_hf(raw)


def test_arithmetic_that_changes_nothing_is_accepted():
    neutral = {
        "logits_scaling": 1.0,
        "residual_multiplier": 1,
        "attention_multiplier": 12**-0.5,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": None,
        "no_rope_layers": [1, 1, 1],
        "use_qk_norm": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "factor": None},
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "_anything": {"else": 1},
    }
    assert config_from_hf(hf(**neutral)) == config_from_hf(hf())


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        config_from_hf(tmp_path)


def test_rotary_buffers_of_old_files_are_known(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write_hf(tmp_path, config, tensors | buffers)
    assert_holds(load_safetensors(tmp_path), tensors)


def test_integer_weights_are_refused(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_hf(tmp_path, config, tensors | {"model.norm.weight": np.zeros(48, np.int8)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(I8\)"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_are_named(tmp_path: pathlib.Path, keep: int):
    write_hf(tmp_path, tiny_config(), random_tensors(tiny_config()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_safetensors(tmp_path)


def test_shards_must_agree_with_their_index(tmp_path: pathlib.Path):
    config, tensors = tiny_config(), random_tensors(tiny_config())
    write_hf(tmp_path, config, tensors, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"surprise": np.zeros(1, np.float32)}, shard)
    with pytest.raises(ValueError, match=r"disagrees with its files about: .*surprise in model-00002"):
        load_safetensors(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00002-of-00002"):
        load_safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json lacks weight_map"):
        load_safetensors(tmp_path)


def test_files_as_their_authors_wrote_them():
    """Keys of published files that change nothing: names of other values, of training, and of what the family does."""
    smollm3 = {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None, "pretraining_tp": 2}
    assert config_from_hf(hf("smollm3", **smollm3)) == config_from_hf(hf("smollm3"))
    hunyuan = {
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0},
        "use_qk_norm": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "norm_type": "rms",
        "pool_type": "last",
        "text_start_id": 6,
    }
    assert config_from_hf(hf("hunyuan_v1_dense", **hunyuan)).rope_theta > 1e7
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {}}}
    assert config_from_hf(hf(**smollm2)) == config_from_hf(hf())
    with pytest.raises(ValueError, match="use_cla is True; accepted: False"):
        config_from_hf(hf("hunyuan_v1_dense", use_cla=True))
