"""Tests `ModelConfig`: its validation and its JSON form."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.tiny import tiny_config

from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.design import Design, Latent

LATENT = Latent(query_rank=0, kv_rank=12, value_dim=8)


def test_window_and_layer_types_must_agree():
    with pytest.raises(ValueError, match="sliding_window=None disagrees"):
        tiny_config(layer_types=("sliding_attention", "full_attention"))
    with pytest.raises(ValueError, match="sliding_window=4 disagrees"):
        tiny_config(sliding_window=4, layer_types=("full_attention", "full_attention"))


def test_dict_round_trip_through_json():
    config = tiny_config(
        rope_scaling=RopeScaling(rope_type="factors", factors=tuple(float(i + 1) for i in range(8))),
        sliding_window=8,
        layer_types=("sliding_attention", "full_attention"),
        eos_token_ids=(1, 2),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"f\.json: unknown keys 'colour'; accepted: model_type, vocab_size, "):
        ModelConfig.from_dict(config.to_dict() | {"colour": "red"}, "f.json")
    with pytest.raises(ValueError, match=r"f\.json lacks head_dim"):
        ModelConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "head_dim"}, "f.json")
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": "2"}}
    with pytest.raises(ValueError, match=r"f\.json: rope_scaling: factor is '2'; accepted: a number"):
        ModelConfig.from_dict(config.to_dict() | scaling, "f.json")


def test_numpys_numbers_become_pythons():
    assert type(tiny_config(vocab_size=np.int64(96)).vocab_size) is int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': expected one of .*llama, .*mixtral, .*qwen3"),
        ({"rope_scaling": RopeScaling(rope_type="factors", factors=(1.0,))}, "has 1 factors, head_dim=16 needs 8"),
        ({"rope_scaling": RopeScaling(rope_type="linear", factors=(1.0,))}, "has 1 factors, head_dim=16 needs 0"),
        ({"eos_token_ids": (96,)}, r"eos_token_ids=\(96,\) must lie in 0..95"),
        ({"eos_token_ids": (True,)}, r"eos_token_ids\[0\] is True; accepted: an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_size": True}, "hidden_size is True; accepted: an integer"),
        ({"hidden_size": "48"}, "hidden_size is '48'; accepted: an integer"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; accepted: at most 4096"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; accepted: a finite number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; accepted: a finite number"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; accepted: 'silu', 'gelu', 'gelu_new', "),
        (
            {"layer_types": ("full", "full")},
            r"layer_types\[0\] is 'full'; accepted: 'full_attention', 'sliding_attention' or",
        ),
        ({"layer_types": ("full_attention",)}, "names 1 layers, num_hidden_layers=2"),
        ({"rotary_dim": 18}, "rotary_dim=18 exceeds head_dim=16"),
        ({"rotary_dim": 7}, "rotary_dim=7 must be even"),
        ({"unrotated_layers": (2,)}, r"unrotated_layers=\(2,\) must lie in 0..1"),
        ({"sliding_window": 0}, "ModelConfig: sliding_window is 0; accepted: at least 1"),
        ({"attention_chunk_size": 8}, "attention_chunk_size=8 needs layer_types with chunked_attention layers"),
        (
            {"latent": LATENT, "num_key_value_heads": 2},
            "num_key_value_heads=2 must equal num_attention_heads=4 in latent attention",
        ),
        (
            {"latent": LATENT, "num_key_value_heads": 4, "head_dim": 6},
            "latent.value_dim=8 exceeds head_dim=6",
        ),
    ],
)
def test_values_that_are_not_accepted_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "su"}, "rope_type is 'su'; accepted: 'linear', 'llama3', 'factors', 'yarn', 'longrope' or"),
        ({"rope_type": "yarn", "first_blended": 2.0}, "first_blended=2.0 must be below last_blended=1.0"),
        ({"rope_type": "linear", "factor": 0.0}, "factor is 0.0; accepted: at least 1e-06"),
        ({"rope_type": "llama3", "low_freq_factor": 5.0}, "low_freq_factor=5.0 must not exceed high_freq_factor=4.0"),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0; accepted: at least 1",
        ),
    ],
)
def test_scalings_that_are_not_accepted_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Design(norm="batch_norm"), "Design: norm is 'batch_norm'; accepted: 'rms_norm', "),  # type: ignore[arg-type]
        (lambda: Design(parallel=1), "Design: parallel is 1; accepted: true or false"),  # type: ignore[arg-type]
        (lambda: Latent(query_rank=-1, kv_rank=8, value_dim=8), "Latent: query_rank is -1; accepted: at least 0"),
        (lambda: Latent(query_rank=0, kv_rank=0, value_dim=8), "Latent: kv_rank is 0; accepted: at least 1"),
        (lambda: Latent(query_rank=0, kv_rank=8, value_dim=1 << 21), "value_dim is 2097152; accepted: at most 1048576"),
    ],
)
def test_designs_that_are_not_accepted_are_named(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()
