"""Tests the decoder: config fields, dtypes, positions, and refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.dense_attention import dense_logits
from support.tiny import random_ids, tiny_config, tiny_model

from minikv_jax.arrays import resolve_dtype
from minikv_jax.cache import memory
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama
from minikv_jax.models.design import Design, Latent
from minikv_jax.models.experts import Experts


def shapes(model: Llama) -> dict[Any, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}


# One changed value per field; what else must change with it so that the config stays valid.
CHANGES: dict[str, dict[str, Any]] = {
    "model_type": {"model_type": "qwen3"},
    "vocab_size": {"vocab_size": 128},
    "hidden_size": {"hidden_size": 64},
    "intermediate_size": {"intermediate_size": 96},
    "num_hidden_layers": {"num_hidden_layers": 3, "layer_types": None, "sliding_window": None},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 8},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "rope_theta": {"rope_theta": 500.0},
    "rope_scaling": {"rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "sliding_window": {"sliding_window": 3},
    "layer_types": {"layer_types": ("full_attention", "sliding_attention")},
    "local_rope_theta": {"local_rope_theta": 100.0},
    "rotary_dim": {"rotary_dim": 8},
    "unrotated_layers": {"unrotated_layers": (1,)},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "attention_multiplier": {"attention_multiplier": 2.0},
    "residual_multiplier": {"residual_multiplier": 0.5},
    "logit_multiplier": {"logit_multiplier": 0.5},
    "attn_logit_softcapping": {"attn_logit_softcapping": 0.1},
    "final_logit_softcapping": {"final_logit_softcapping": 2.0},
    "attention_chunk_size": {"attention_chunk_size": 4, "layer_types": ("chunked_attention", "sliding_attention")},
    "query_tuning": {"query_tuning": (4, 0.5), "unrotated_layers": (0, 1)},
    "experts": {"experts": Experts(count=4, per_token=2, intermediate_size=80)},
    "latent": {"latent": Latent(query_rank=0, kv_rank=8, value_dim=8), "num_key_value_heads": 4},
    "own_design": {"own_design": Design(parallel=True)},
}
# max_position_embeddings has a test of its own; eos_token_ids belongs to generate.
ELSEWHERE = {"max_position_embeddings", "eos_token_ids"}


def test_the_list_of_changes_is_complete():
    assert CHANGES.keys() | ELSEWHERE == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("field", CHANGES)
def test_every_config_field_is_read(field: str):
    base: dict[str, Any] = {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention")}
    ids = random_ids((1, 12))
    before, after = tiny_model(**base), tiny_model(**base | CHANGES[field])
    if shapes(before) == shapes(after):
        assert jnp.max(jnp.abs(dense_logits(before, ids) - dense_logits(after, ids))) > 1e-4


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_every_activation_differs(act: str):
    ids = random_ids((1, 4))
    assert not jnp.allclose(dense_logits(tiny_model(), ids), dense_logits(tiny_model(hidden_act=act), ids), atol=1e-5)


def test_attend_gets_every_layer_in_order_and_the_right_shapes():
    model, seen = tiny_model(), []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        seen.append((layer, q.shape, k.shape, v.shape))
        return q

    ids = random_ids((2, 5))
    hidden = model.forward(ids, jnp.zeros_like(ids), attend)
    assert hidden.shape == (2, 5, 48)
    assert seen == [(layer, (2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16)) for layer in range(2)]
    assert model.logits(hidden[:, -1]).shape == (2, 96)


def test_stepwise_positions_equal_one_shot():
    model, ids = tiny_model(), random_ids((1, 6))
    whole: dict[int, list[jax.Array]] = {}
    steps: dict[int, list[jax.Array]] = {}

    def recorder(into: dict[int, list[jax.Array]]):
        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            into.setdefault(layer, []).append(k)
            return q

        return attend

    model.forward(ids, jnp.arange(6, dtype=jnp.int32)[None], recorder(whole))
    for t in range(6):
        model.forward(ids[:, t : t + 1], jnp.array([[t]], jnp.int32), recorder(steps))
    for layer in range(2):
        np.testing.assert_allclose(jnp.concatenate(steps[layer], axis=1), whole[layer][0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_half_precision_is_close_and_promotes_nothing(dtype: str, model_type: str):
    wide, narrow = tiny_model(model_type=model_type), tiny_model(dtype=dtype, model_type=model_type)
    graph, state = nnx.split(wide)
    narrow = nnx.merge(nnx.graphdef(narrow), jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    ids = random_ids((2, 9))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(nnx.state(narrow)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = dense_logits(narrow, ids)
    assert found.dtype == jnp.float32
    expected = dense_logits(nnx.merge(graph, state), ids)
    # About 20 roundings lie between input and logits; each is worth up to half an ulp of values near the largest one.
    ulp = float(jnp.finfo(dtype).eps) * float(jnp.max(jnp.abs(expected)))
    assert jnp.max(jnp.abs(found - expected)) < 10 * ulp


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dtype='float64': expected one of float32, bfloat16, float16"):
        tiny_model(dtype="float64")
    with pytest.raises(ValueError, match="dtype=None: expected one of float32"):
        resolve_dtype(None)
    with pytest.raises(ValueError, match="dtype='float33'"):
        tiny_model(dtype="float33")
    with pytest.raises(ValueError, match="65 tokens do not fit max_position_embeddings=64"):
        dense_logits(tiny_model(), random_ids((1, 65)))


def test_an_id_outside_the_vocabulary_gives_nan():
    assert jnp.all(jnp.isnan(dense_logits(tiny_model(), jnp.array([[96]], jnp.int32))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "phi"},
        {"model_type": "gemma2", "tie_word_embeddings": True},
    ],
)
def test_weight_bytes_are_those_of_the_model(changes: dict):
    """Bytes that a decode step reads are all parameters, except an embedding that is not also the output layer."""
    config = tiny_config(**changes)
    model = nnx.eval_shape(lambda: Llama(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * 2
    assert memory.weight_bytes(config, "bfloat16") == total - table
