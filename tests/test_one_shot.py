"""Tests the one-shot forward: dense attention, padding, float32 matmuls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.dense_attention import dense_logits
from support.tiny import random_ids, tiny_model

from minikv_jax.models.decoder import Llama
from minikv_jax.one_shot import one_shot

RUN = jax.jit(one_shot)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"tie_word_embeddings": True}], ids=str)
def test_one_shot_equals_dense_attention(changes: dict[str, Any]):
    model, ids = tiny_model(**changes), random_ids((2, 12))
    # Two orders of summation over at most 96 float32 terms of size 1.
    np.testing.assert_allclose(RUN(model, ids), jax.jit(dense_logits)(model, ids), atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_matmuls_stay_float32_on_devices_that_round_by_default(tied: bool):
    model = tiny_model(tie_word_embeddings=tied)
    program = jax.jit(lambda ids: one_shot(model, ids)).lower(random_ids((1, 8))).as_text()
    dots = [line for line in program.splitlines() if "dot_general" in line]
    assert len(dots) > 8
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_padding_does_not_change_a_row():
    model, ids = tiny_model(), random_ids((2, 12))
    both = RUN(model, ids, jnp.array([7, 12], jnp.int32))
    np.testing.assert_allclose(both[0, :7], RUN(model, ids[:1, :7])[0], atol=2e-5)
    np.testing.assert_allclose(both[1], RUN(model, ids[1:])[0], atol=2e-5)


def test_a_second_call_does_not_retrace():
    model, traces = tiny_model(), []

    @jax.jit
    def run(model: Llama, ids: jax.Array) -> jax.Array:
        traces.append(ids.shape)
        return one_shot(model, ids)

    first = run(model, random_ids((1, 8)))
    again = run(model, random_ids((1, 8)))
    assert len(traces) == 1
    np.testing.assert_array_equal(first, again)
