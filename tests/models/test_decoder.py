import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import random_ids, tiny_config, tiny_model

from minikv_jax.cache import memory
from minikv_jax.models.config import ModelConfig, RopeScaling
from minikv_jax.models.decoder import Llama, resolve_dtype
from minikv_jax.models.rotary import inverse_frequencies, rotary_tables, rotate

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16)


def dense_attend(model: Llama):
    """The textbook attention, written apart from the library's."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        groups = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None, :]
        window = model.window(layer)
        seen = (distance >= 0) & (distance < (q.shape[1] if window is None else window))
        weights = jax.nn.softmax(jnp.where(seen[None, None], logits, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    return attend


def dense_logits(model: Llama, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    return model.logits(model.forward(ids, positions, dense_attend(model)))


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


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "linear"},
        {"factor": 2.0},
        {"low_freq_factor": 0.5},
        {"high_freq_factor": 8.0},
        {"original_max_position_embeddings": 64},
        {"rope_type": "factors", "factors": tuple(1.0 + i for i in range(8))},
    ],
)
def test_every_scaling_field_is_read(change: dict[str, Any]):
    before = inverse_frequencies(tiny_config(rope_scaling=LLAMA3))
    after = inverse_frequencies(tiny_config(rope_scaling=dataclasses.replace(LLAMA3, **change)))
    assert before.dtype == after.dtype == np.float32
    assert not np.allclose(before, after, rtol=1e-3)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
    plain = inverse_frequencies(tiny_config(head_dim=64))
    scaled = inverse_frequencies(tiny_config(head_dim=64, rope_scaling=LLAMA3))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 16 / 4], plain[wavelengths < 16 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 16], plain[wavelengths > 16] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


def test_rotation_depends_on_the_distance_only():
    config = tiny_config()
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(at: int, distance: int) -> jax.Array:
        turned = [rotate(x, *rotary_tables(config, jnp.array([[p]]))) for x, p in ((q, at + distance), (k, at))]
        return jnp.sum(turned[0] * turned[1])

    # float32 angles of up to 60 radians are off by 60 * 2**-24, which a product of two unit rotations doubles.
    np.testing.assert_allclose(score(0, 5), score(50, 5), rtol=1e-4, atol=1e-4)
    assert abs(score(0, 5) - score(0, 6)) > 1e-2


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"tie_word_embeddings": True}], ids=str)
def test_call_equals_dense_attention(changes: dict[str, Any]):
    model, ids = tiny_model(**changes), random_ids((2, 12))
    # Two orders of summation over at most 96 float32 terms of size 1.
    np.testing.assert_allclose(model(ids), dense_logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_matmuls_stay_float32_on_devices_that_round_by_default(tied: bool):
    model = tiny_model(tie_word_embeddings=tied)
    program = jax.jit(lambda ids: model(ids)).lower(random_ids((1, 8))).as_text()
    dots = [line for line in program.splitlines() if "dot_general" in line]
    assert len(dots) > 8
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_padding_does_not_change_a_row():
    model, ids = tiny_model(), random_ids((2, 12))
    both = model(ids, jnp.array([7, 12], jnp.int32))
    np.testing.assert_allclose(both[0, :7], model(ids[:1, :7])[0], atol=2e-5)
    np.testing.assert_allclose(both[1], model(ids[1:])[0], atol=2e-5)


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
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
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


def test_a_second_call_does_not_retrace():
    model, traces = tiny_model(), []

    @jax.jit
    def run(model: Llama, ids: jax.Array) -> jax.Array:
        traces.append(ids.shape)
        return model(ids)

    first = run(model, random_ids((1, 8)))
    again = run(model, random_ids((1, 8)))
    assert len(traces) == 1
    np.testing.assert_array_equal(first, again)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dtype='float64': expected one of float32, bfloat16, float16"):
        tiny_model(dtype="float64")
    with pytest.raises(ValueError, match="dtype=None: expected one of float32"):
        resolve_dtype(None)
    with pytest.raises(ValueError, match="dtype='float33'"):
        tiny_model(dtype="float33")
    with pytest.raises(ValueError, match="65 tokens do not fit max_position_embeddings=64"):
        tiny_model()(random_ids((1, 65)))


def test_an_id_outside_the_vocabulary_gives_nan():
    assert jnp.all(jnp.isnan(tiny_model()(jnp.array([[96]], jnp.int32))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_weight_bytes_are_those_of_the_model(changes: dict):
    """Bytes that a decode step reads: all parameters but an embedding table that is not the output layer too."""
    config = tiny_config(**changes)
    model = nnx.eval_shape(lambda: Llama(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * 2
    assert memory.weight_bytes(config, "bfloat16") == total - table
