"""Tests the importance of KV heads against finite differences of a loss that a whole run of the model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

from minikv_jax.models.decoder import Llama
from minikv_jax.retrieval_heads import Question, importance, most_important

SINKS, RECENT = 2, 5
TEXT = tuple(range(3, 33))
QUESTIONS = [
    Question(TEXT, (7, 8, 9, 40, 41, 42), 3),
    Question(TEXT, (11, 5, 90), 1),
    Question(tuple(range(50, 72)), (1, 2, 60), 1),
]


def loss(model: Llama, question: Question, gates: np.ndarray) -> float:
    """Mean loss of the answer, from one run over text and question with a gate per layer and KV head."""
    ids = np.array([question.text + question.asked])
    prompt, tokens = len(question.text), ids.shape[1]
    at = np.arange(tokens)
    causal = at <= at[:, None]
    few = causal & ((at < SINKS) | (at >= prompt - RECENT) | (at[:, None] < prompt))

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x[0], group, axis=1) for x in (k, v))
        logits = jnp.einsum("tnh,snh->nts", q[0], k) * q.shape[-1] ** -0.5
        gate = jnp.repeat(jnp.asarray(gates[layer]), group)[:, None, None]
        outs = [jnp.einsum("nts,snh->nth", jax.nn.softmax(jnp.where(m, logits, -1e30)), v) for m in (causal, few)]
        return (gate * outs[0] + (1 - gate) * outs[1]).swapaxes(0, 1)[None]

    hidden = model.forward(jnp.asarray(ids), jnp.asarray(at)[None], attend)
    scores = jax.nn.log_softmax(model.logits(hidden[0, :-1]))
    return -float(jnp.take_along_axis(scores, jnp.asarray(ids[0, 1:, None]), axis=-1)[-question.answer :].mean())


def test_importance_is_the_slope_of_the_loss() -> None:
    model, step = tiny_model(), 0.05
    half = np.full((2, 2), 0.5)
    expected = []
    for question in QUESTIONS:
        slopes = np.zeros((2, 2))
        for place in np.ndindex(2, 2):
            more, less = half.copy(), half.copy()
            more[place] += step
            less[place] -= step
            slopes[place] = (loss(model, question, less) - loss(model, question, more)) / (2 * step)
        assert np.abs(slopes).min() > 1e-5  # float32 shows the differences
        expected.append(slopes / np.abs(slopes).sum())
    done: list[int] = []
    got = importance(model, QUESTIONS, sinks=SINKS, recent=RECENT, done=done.append)
    np.testing.assert_allclose(got, np.mean(expected, axis=0), rtol=0.02, atol=0.01)
    assert done == [1, 2, 3]


def test_layers_with_a_window_have_no_importance() -> None:
    windowed = {"model_type": "qwen2", "sliding_window": 8, "layer_types": ("full_attention", "sliding_attention")}
    found = importance(tiny_model(**windowed), QUESTIONS[:1], sinks=SINKS, recent=RECENT)
    assert np.all(found[0] != 0)
    assert np.all(found[1] == 0)


def test_the_best_heads_come_in_order() -> None:
    assert most_important(np.array([[0.1, 0.3], [0.2, -1.0], [0.3, 0.0]]), 3) == ((0, 1), (1, 0), (2, 0))
    with pytest.raises(ValueError, match="heads=5: expected at most 4, as the others lower no answer's loss"):
        most_important(np.array([[0.1, 0.3], [0.2, -1.0], [0.3, 0.0]]), 5)
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"heads={count}: expected 1 to 6"):
            most_important(np.zeros((3, 2)), count)


def test_wrong_input_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"questions=.*expected at least one"):
        importance(model, [])
    with pytest.raises(ValueError, match="answer=3: expected 1 to 2 of the tokens asked"):
        importance(model, [Question((1, 2), (3, 4, 5), 3)])
    with pytest.raises(ValueError, match=r"a question of 70 tokens, 67 of them text: .* the model's 64 positions"):
        importance(model, [Question(tuple(range(67)), (3, 4, 5), 1)])
    with pytest.raises(ValueError, match="recent=-1"):
        importance(model, QUESTIONS, recent=-1)
    capped = tiny_model(attn_logit_softcapping=30.0)
    with pytest.raises(ValueError, match="soft caps"):
        importance(capped, QUESTIONS)
