"""Checks a method's components against their contracts on abstract shapes, without computing anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minikv_jax.methods import calls
from minikv_jax.methods.base import KeptTokens, LayerInputs, Operand, Quantizer, ScoredBudget
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import QUANTIZERS
from minikv_jax.models.config import ModelConfig

_ROWS, _TOKENS, _KEPT, _WIDTH = 2, 96, 40, 24  # shapes that components are tried on


def check(method: Method, model: ModelConfig) -> None:
    """Raises ValueError if a method does not fit a model or one of its components breaks its contract.

    The text names the component, its inputs, what it returned or raised, and what is expected.
    """
    if not isinstance(model, ModelConfig):
        raise ValueError(f"model is a {type(model).__name__}: expected a ModelConfig")
    if method.sinks > model.max_position_embeddings:
        raise ValueError(f"sinks={method.sinks}: the model has {model.max_position_embeddings} positions")
    windows = {model.window(layer) for layer in range(model.num_hidden_layers)} - {None}
    if method.evict_every is not None and windows:
        raise ValueError(
            f"evict_every={method.evict_every}: a layer with a sliding window ({windows.pop()}) evicts by it"
        )
    _check_retrieval_heads(method, model)
    if method.runs_twice and model.rope_by_length:
        cause = f"lookahead={method.lookahead}" if method.lookahead else f"scorer={type(method.scorer).__name__}"
        raise ValueError(
            f"{cause}: the model's rotary frequencies depend on the length of a row, and tokens after the prompt would "
            "change the prompt's"
        )
    if method.quantizer is not None:
        calls.check_model(method.quantizer, model)
    check_components(
        method,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        layers=model.num_hidden_layers,
    )


def _check_retrieval_heads(method: Method, model: ModelConfig) -> None:
    """Raises ValueError for heads that the model does not have, or if heads cannot be stored in groups."""
    layers, heads = model.num_hidden_layers, model.num_key_value_heads
    for layer, head in method.retrieval_heads:
        if layer >= layers or head >= heads:
            raise ValueError(
                f"retrieval_heads: layer {layer}, head {head}: the model has layers 0..{layers - 1} and KV heads "
                f"0..{heads - 1}"
            )
    if method.retrieval_heads and method.quantizer is not None and method.quantizer.by_head:
        kind = type(method.quantizer).__name__
        raise ValueError(f"retrieval_heads with quantizer {kind}: expected one that stores all heads alike")


@functools.lru_cache(maxsize=256)
def check_components(method: Method, *, heads: int, kv_heads: int, head_dim: int, layers: int) -> None:
    """Raises ValueError if a component breaks its contract for a model of these sizes."""
    _check_scorer(method, heads, kv_heads, head_dim)
    if isinstance(method.budget, ScoredBudget):
        scores, lengths = [_floats(_ROWS, kv_heads, _TOKENS)] * layers, _integers(_ROWS)
        _trace(functools.partial(calls.scored_weights, method.budget), scores, lengths)
    else:
        calls.layer_weights(method.budget, layers)
    if method.refit is not None:
        _check_refit(method, heads, kv_heads, head_dim)
    if method.quantizer is not None:
        for operand in (method.quantizer.operand("keys", 0), method.quantizer.operand("values", 0)):
            _check_quantizer(method.quantizer, operand, kv_heads, head_dim)


def _check_scorer(method: Method, heads: int, kv_heads: int, head_dim: int) -> None:
    scorer, scores = method.scorer, _floats(_ROWS, kv_heads, _TOKENS)
    q, k = _floats(_ROWS, _TOKENS, heads, head_dim), _floats(_ROWS, _TOKENS, kv_heads, head_dim)
    sums = scores if scorer.needs_column_sums else None

    votes = (scores,) * len(calls.vote_windows(scorer))

    def run(q: Array, k: Array, lengths: Array, given: dict[str, Any]) -> Array:
        return calls.score(scorer, LayerInputs(q, k, k, lengths, **given, sinks=method.sinks))

    def again(q: Array, k: Array, lengths: Array, given: dict[str, Any], scores: Array) -> Array:
        return calls.rescore(scorer, LayerInputs(q, k, k, lengths, **given, sinks=method.sinks), scores)

    known = {"frequencies": _floats(head_dim // 2)}
    if scorer.needs_output_projection:
        known["output_projection"] = _floats(heads * head_dim, _WIDTH)
    _trace(run, q, k, _integers(_ROWS), known | {"column_sums": sums, "layer": _integers(), "votes": votes})
    if calls.first_share(scorer) < 1:
        _trace(again, q, k, _integers(_ROWS), known, scores)
    if method.evict_every and scorer.can_update:
        _trace(functools.partial(calls.update, scorer), scores, scores)


def _check_refit(method: Method, heads: int, kv_heads: int, head_dim: int) -> None:
    refit, kept = method.refit, _floats(_ROWS, kv_heads, _KEPT, head_dim)
    assert refit is not None
    q, k = _floats(_ROWS, _TOKENS, heads, head_dim), _floats(_ROWS, _TOKENS, kv_heads, head_dim)

    def run(q: Array, k: Array, lengths: Array, kept: Array, positions: Array, frequencies: Array) -> Array:
        inputs = LayerInputs(q, k, k, lengths, None, None, 0, frequencies, method.sinks)
        return calls.refit(refit, inputs, KeptTokens(kept, kept, positions, lengths))

    _trace(run, q, k, _integers(_ROWS), kept, _integers(_ROWS, kv_heads, _KEPT), _floats(_ROWS, head_dim // 2))


def _check_quantizer(quantizer: Quantizer, operand: Operand, kv_heads: int, head_dim: int) -> None:
    shapes = [(_ROWS, kv_heads, blocks * quantizer.block, head_dim) for blocks in (1, 3)]
    stored = [_trace(lambda x: calls.encode(quantizer, x, operand), _floats(*shape)) for shape in shapes]
    rows = [jax.tree.map(lambda leaf: (leaf.shape[2], leaf.shape[3:]), tree) for tree in stored]
    times_three = jax.tree.map(lambda leaf: (3 * leaf.shape[2], leaf.shape[3:]), stored[0])
    what = f"quantizer {QUANTIZERS.name_of(quantizer)!r}: {operand.kind}"
    if rows[1] != times_three:
        raise ValueError(
            f"{what}: encode returns {_shown(stored[0])} for {list(shapes[0])} and {_shown(stored[1])} for "
            f"{list(shapes[1])}: expected the same pytree of arrays [B, K, S / r, ...] for any number of tokens"
        )
    for tree, shape in zip(stored, shapes, strict=True):
        _trace(lambda tree, shape=shape: calls.decode(quantizer, tree, operand, shape), tree)
    with jax.ensure_compile_time_eval():  # gives numbers even while a program is traced
        rotation = calls.rotation(quantizer, operand, head_dim)
    if rotation is not None:
        matrix = np.asarray(rotation, np.float64)
        error = np.abs(matrix @ matrix.T - np.eye(head_dim)).max()
        if not error < 1e-4:
            raise ValueError(f"{what}: rotation is not orthogonal: R @ R.T differs from 1 by {error:.2g}")


def _trace(function: Callable, *shapes: Any) -> Any:
    """Calls `jax.eval_shape`, and drops JAX's notes on its own frames from errors."""
    try:
        return jax.eval_shape(function, *shapes)
    except ValueError as error:
        raise ValueError(str(error)) from error.__cause__


def _shown(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree))


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
