"""Tests decode and extend on a model: `full` gives the logits of one pass over the whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import random_ids, tiny_model

import minikv_jax as mk
from minikv_jax.decode import decode, extend
from minikv_jax.one_shot import one_shot
from minikv_jax.prefill import prefill

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


@pytest.mark.parametrize(
    ("token", "active", "seen", "message"),
    [
        (96, 1, 70, r"decode: token lies in 5..96: expected integers in 0..95"),
        (5, 2, 70, r"decode: active lies in 1..2: expected integers in 0..1"),
        (5, 1, 128, r"decode: row 1 has seen 128 tokens and gets 1: the model has 128 positions"),
    ],
)
def test_a_compiled_step_reports_values_out_of_range(
    model: mk.Llama, token: int, active: int, seen: int, message: str
) -> None:
    """`debug_checks` says what the step alone would take for granted."""
    ids = random_ids((2, PROMPT))
    _, cache = PREFILL(model, ids, jnp.array([PROMPT, PROMPT]))
    cache = dataclasses.replace(cache, length=jnp.array([PROMPT, seen]))
    checked = mk.debug_checks(decode)
    with pytest.raises(ValueError, match=f"^{message}$"):
        checked(model, cache, jnp.array([5, token]), jnp.array([1, active]))
    fine = jnp.array([5, 5]), jnp.array([1, 0])
    hidden, stepped = checked(model, cache, *fine)
    close(hidden, jax.jit(decode)(model, cache, *fine)[0])
    assert stepped.length.tolist() == [PROMPT + 1, seen]


def test_a_compiled_prefill_and_turn_report_values_out_of_range(model: mk.Llama) -> None:
    ids, lengths = random_ids((2, 8)), jnp.array([8, 3])
    start = mk.debug_checks(functools.partial(prefill, method="full", max_new_tokens=4))
    with pytest.raises(ValueError, match=r"^prefill: lengths lies in 0..8: expected integers in 1..8$"):
        start(model, ids, jnp.array([8, 0]))
    _, cache = start(model, ids, lengths)
    turn = mk.debug_checks(extend)
    with pytest.raises(ValueError, match=r"^append: row 0 gets 5 tokens and has room for 4$"):
        turn(model, cache, ids, jnp.array([5, 1]))
    assert turn(model, cache, ids, jnp.array([4, 1]))[1].length.tolist() == [12, 4]
