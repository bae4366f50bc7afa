"""Tests decode and extend on a model: `full` gives the logits of one pass over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import random_ids, tiny_model

import minikv_jax as mk
from minikv_jax.decode import decode, extend
from minikv_jax.prefill import one_shot, prefill

TOKENS, PROMPT = 101, 70
PREFILL = jax.jit(functools.partial(prefill, method="full", max_new_tokens=TOKENS - PROMPT))
IDS = random_ids((1, TOKENS))


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=128)


@pytest.fixture(scope="module")
def expected(model: mk.Llama) -> jax.Array:
    """Computes the logits of one pass over all tokens."""
    return jax.jit(one_shot)(model, IDS)


# Sums have different orders; logits here are of size 1, float32 rounds at 1e-7 of that per operation.
close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=2e-5)


def test_steps_equal_one_shot_forward(model: mk.Llama, expected: jax.Array):
    hidden, cache = PREFILL(model, IDS[:, :PROMPT], jnp.array([PROMPT]))
    step, logits = jax.jit(decode), [model.logits(hidden)]
    for t in range(PROMPT, TOKENS):
        hidden, cache = step(model, cache, IDS[:, t], jnp.ones(1, jnp.int32))
        logits.append(model.logits(hidden))
    close(jnp.stack(logits, axis=1), expected[:, PROMPT - 1 :])
    assert cache.length.tolist() == [TOKENS]


def test_extend_equals_one_shot_forward(model: mk.Llama, expected: jax.Array):
    _, cache = PREFILL(model, IDS[:, :PROMPT], jnp.array([PROMPT]))
    hidden, cache = jax.jit(extend)(model, cache, IDS[:, PROMPT:], jnp.array([TOKENS - PROMPT]))
    close(model.logits(hidden), expected[:, PROMPT:])
    assert cache.length.tolist() == [TOKENS]
