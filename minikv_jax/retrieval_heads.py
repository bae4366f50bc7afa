"""Retrieval heads: ranks a model's KV heads by how much its answers need all of their tokens.

Some heads fetch what stands far back, the others read the newest tokens (DuoAttention, arXiv 2410.10819). As in that
paper, a gate per KV head mixes attention over all tokens with attention over the first and the newest ones. The paper
trains the gates. Here one gradient of the answers' loss, with every gate half open, ranks them: a head whose gate would
lower the loss most by opening comes first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.checks import at_least
from minikv_jax.layerwise import PromptLayer, prefill_layers
from minikv_jax.models import windows
from minikv_jax.models.config import Rope
from minikv_jax.models.decoder import Layer, Llama
from minikv_jax.models.rotary import rotary_tables, tuned

_HALF_OPEN = 0.5  # open gates show only what one head adds to all others; closed ones, what one does alone


class Question(NamedTuple):
    """A text, a question about it with its answer, and the number of the answer's tokens, which end `asked`."""

    text: tuple[int, ...]
    asked: tuple[int, ...]
    answer: int


def importance(
    model: Llama,
    questions: Sequence[Question],
    *,
    sinks: int = 4,
    recent: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Computes how fast the loss of the answers falls as the gate of each KV head opens.

    Args:
      model: the model.
      questions: texts with something hidden in them, and questions about it. A text runs once for consecutive questions
        about it, and texts of equal lengths share programs.
      sinks, recent: the first and newest tokens that a head always sees.
      done: called with the number of questions that are done.

    Returns:
      float32 `[L, K]`: each head's share of a question's slopes, whose magnitudes sum to 1; the mean over the
      questions. Negative if the head does harm. Zero in layers with a sliding window.

    Raises:
      ValueError: no questions, an empty text, an answer that is not a part of what is asked, too many tokens for the
        model, a negative count, or a model with soft caps or attention sinks.
    """
    at_least(0, sinks=sinks, recent=recent)
    if not questions:
        raise ValueError("questions=[]: expected at least one")
    if model.config.attn_logit_softcapping is not None or model.config.design.attention_sinks:
        raise ValueError(f"a model of type {model.config.model_type!r}: gates know no soft caps and no attention sinks")
    for question in questions:
        if not 0 < question.answer < len(question.asked):
            raise ValueError(f"answer={question.answer}: expected 1 to {len(question.asked) - 1} of the tokens asked")
        tokens, positions = len(question.text) + len(question.asked), model.config.max_position_embeddings
        if not question.text or tokens > positions:
            raise ValueError(
                f"a question of {tokens} tokens, {len(question.text)} of them text: expected text, and at "
                f"most the model's {positions} positions"
            )
    total = np.zeros((model.config.num_hidden_layers, model.config.num_key_value_heads), np.float32)
    numbers = itertools.count(1)
    for text, about_it in itertools.groupby(questions, key=lambda question: question.text):
        _, prompt = prefill_layers(model, np.array([text], np.int32), np.array([len(text)], np.int32), False, "xla")
        for question in about_it:
            slopes = _slopes(model, question, prompt, sinks, recent)
            total += slopes / max(np.abs(slopes).sum(), np.finfo(np.float32).tiny)  # each question counts alike
            done(next(numbers))
    return total / len(questions)


def check_count(count: int, heads: int) -> None:
    """Raises ValueError unless `count` is in 1..`heads`, the model's KV heads."""
    if not 1 <= count <= heads:
        raise ValueError(f"heads={count}: expected 1 to {heads}, the model's KV heads")


def most_important(importance: np.ndarray, count: int) -> tuple[tuple[int, int], ...]:
    """Returns the `count` pairs (layer, KV head) of highest importance, for `Method.retrieval_heads`.

    Raises:
      ValueError: `count` is not in 1..`importance.size`, or fewer heads have a positive importance.
    """
    check_count(count, importance.size)
    if count > (useful := int((importance > 0).sum())):
        raise ValueError(f"heads={count}: expected at most {useful}, as the others lower no answer's loss")
    best = np.argsort(-importance, axis=None, kind="stable")[:count]
    layers, heads = np.unravel_index(best, importance.shape)
    return tuple(sorted(zip(layers.tolist(), heads.tolist(), strict=True)))


class _Prompt(NamedTuple):
    """A layer's prompt, and what the new tokens see of it through an open and a closed gate, and of each other."""

    k: Float[Array, "S K H"]
    v: Float[Array, "S K H"]
    open: Bool[Array, "T S"]
    closed: Bool[Array, "T S"]
    new: Bool[Array, "T T"]


def _slopes(model: Llama, question: Question, layers: list[PromptLayer], sinks: int, recent: int) -> np.ndarray:
    """Runs a question forward and backward, layer by layer, after its text."""
    asked = np.array([question.asked], np.int32)
    prompt, new = len(question.text), asked.shape[1] - 1
    positions = prompt + jnp.arange(new)[None]
    gates = jnp.full((model.config.num_key_value_heads,), _HALF_OPEN, jnp.float32)
    inputs: list[Array] = []
    cases: list[tuple[Layer, _Prompt, Rope]] = []
    x = model.embed(jnp.asarray(asked[:, :-1]))
    for number, (layer, seen) in enumerate(zip(model.layers, layers, strict=True)):
        at, window = jnp.arange(prompt + new), model.window(number)
        oldest = jnp.zeros(new, jnp.int32) if window is None else windows.oldest(window, positions[0])
        visible = (at >= oldest[:, None]) & (at <= positions[0][:, None])
        near = (at < sinks) | (at >= prompt - recent) | (window is not None)  # gates of such a layer change nothing
        masks = visible[:, :prompt], (visible & near)[:, :prompt], visible[:, prompt:]
        cases.append((layer, _Prompt(seen.k[0], seen.v[0], *masks), model.config.rope(number)))
        inputs.append(x)
        x = _forward(layer, x, gates, positions, cases[-1][1], rope=cases[-1][2])
    slope = _loss_slope(model, x, jnp.asarray(asked[0, 1:]), question.answer)
    slopes = []
    for (layer, seen, rope), x in zip(reversed(cases), reversed(inputs), strict=True):
        slope, of_gates = _backward(layer, x, gates, positions, seen, slope, rope=rope)
        slopes.append(-of_gates)
    return np.stack(jax.device_get(slopes[::-1]))


def _loss_slope(model: Llama, x: Array, targets: Int[Array, "T"], answer: int) -> Array:
    """Gradient of the answer's mean loss in the last layer's output."""

    def loss(x: Array) -> Array:
        logits = jax.nn.log_softmax(model.logits(model.norm(x)[0, -answer:]))
        return -jnp.take_along_axis(logits, targets[-answer:, None], axis=-1).mean()

    return jax.grad(loss)(x)


def _layer(layer: Layer, x: Array, gates: Array, positions: Array, prompt: _Prompt, rope: Rope) -> Array:
    def attend(q: Array, k: Array, v: Array) -> Array:
        return _gated_attention(tuned(q, rope, positions)[0], k[0], v[0], gates, prompt)[None]

    return layer(x, *rotary_tables(rope, positions), attend)


_forward = jax.jit(_layer, static_argnames="rope")


@functools.partial(jax.jit, static_argnames="rope")
def _backward(
    layer: Layer, x: Array, gates: Array, positions: Array, prompt: _Prompt, slope: Array, *, rope: Rope
) -> tuple[Array, Array]:
    _, pull = jax.vjp(lambda x, gates: _layer(layer, x, gates, positions, prompt, rope), x, gates)
    return pull(slope)


def _gated_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    gates: Float[Array, "K"],
    prompt: _Prompt,
) -> Float[Array, "T N H"]:
    """Attends to the prompt, as far as each gate lets it through, and to the new tokens."""
    tokens, kv_heads, dim = k.shape
    grouped = q.reshape(tokens, kv_heads, -1, dim).astype(jnp.float32) * dim**-0.5
    keys, values = (jnp.concatenate(pair).astype(jnp.float32) for pair in ((prompt.k, k), (prompt.v, v)))
    logits = jnp.einsum("tkgh,skh->kgts", grouped, keys)

    def out(of_prompt: Array) -> Array:
        seen = jnp.concatenate([of_prompt, prompt.new], axis=1)
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,skh->tkgh", weights, values)

    gate = gates[:, None, None]
    mixed = gate * out(prompt.open) + (1 - gate) * out(prompt.closed)
    return mixed.reshape(q.shape).astype(q.dtype)
