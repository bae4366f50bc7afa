"""Holds a method's components against their contracts on abstract shapes; nothing is computed."""

from __future__ import annotations

import functools
import inspect
import math
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minikv_jax.methods.base import (
    Budget,
    Component,
    FunctionBudget,
    FunctionScorer,
    LayerInputs,
    Operand,
    Quantizer,
    ScoredBudget,
)
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import BUDGETS, QUANTIZERS, SCORERS
from minikv_jax.models.config import ModelConfig

_ROWS, _TOKENS = 2, 96  # the shapes that components are tried on


def check(method: Method, model: ModelConfig) -> None:
    """Raises ValueError if a method does not fit a model, or one of its components breaks its contract.

    The text names the component, what it got, what it returned or raised, and what is expected.
    """
    if method.sinks > model.max_position_embeddings:
        raise ValueError(f"sinks={method.sinks}: the model has {model.max_position_embeddings} positions")
    windows = {model.window(layer) for layer in range(model.num_hidden_layers)} - {None}
    if method.evict_every is not None and windows:
        raise ValueError(
            f"evict_every={method.evict_every}: a layer with a sliding window ({windows.pop()}) evicts by it"
        )
    if method.quantizer is not None:
        method.quantizer.check(model)
    heads = (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    _check_components(method, *heads, model.num_hidden_layers)


@functools.lru_cache(maxsize=256)
def _check_components(method: Method, heads: int, kv_heads: int, head_dim: int, layers: int) -> None:
    _check_scorer(method, heads, kv_heads, head_dim)
    if isinstance(method.budget, ScoredBudget):
        _check_scored_budget(method.budget, kv_heads, layers)
    else:
        _check_budget(method.budget, layers)
    if method.quantizer is not None:
        for operand in (method.quantizer.operand("keys", 0), method.quantizer.operand("values", 0)):
            _check_quantizer(method.quantizer, operand, kv_heads, head_dim)


def _check_scorer(method: Method, heads: int, kv_heads: int, head_dim: int) -> None:
    scorer = method.scorer
    q = jax.ShapeDtypeStruct((_ROWS, _TOKENS, heads, head_dim), jnp.float32)
    k = jax.ShapeDtypeStruct((_ROWS, _TOKENS, kv_heads, head_dim), jnp.float32)
    lengths = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
    scores = jax.ShapeDtypeStruct((_ROWS, kv_heads, _TOKENS), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    frequencies = jax.ShapeDtypeStruct((head_dim // 2,), jnp.float32)

    def run(q: Array, k: Array, lengths: Array, sums: Array, layer: Array, frequencies: Array) -> Array:
        column_sums = sums if scorer.needs_column_sums else None
        return scorer.score(LayerInputs(q, k, k, lengths, column_sums, None, layer, frequencies, method.sinks))

    what = f"scorer {SCORERS.name_of(scorer)!r}"
    file = _file(scorer.function if isinstance(scorer, FunctionScorer) else scorer)
    out = _abstract(what, file, run, q, k, lengths, scores, layer, frequencies)
    _expect(what, out, scores.shape, "[B, K, T]")
    if method.evict_every and scorer.can_update:
        what += ": update"
        _expect(what, _abstract(what, file, scorer.update, scores, scores), scores.shape, "[B, K, C]")


def _check_scored_budget(budget: ScoredBudget, kv_heads: int, layers: int) -> None:
    scores = [jax.ShapeDtypeStruct((_ROWS, kv_heads, _TOKENS), jnp.float32)] * layers
    lengths = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
    what = f"budget {BUDGETS.name_of(budget)!r}"
    out = _abstract(what, _file(budget), budget.weights, scores, lengths)
    _expect(what, out, (layers, _ROWS), "[L, B]")


def _check_budget(budget: Budget, layers: int) -> None:
    what = f"budget {BUDGETS.name_of(budget)!r}"
    file = _file(budget.function if isinstance(budget, FunctionBudget) else budget)
    try:
        weights: Sequence[Any] = list(budget.weights(layers))
        valid = len(weights) == layers and all(math.isfinite(value) and value >= 0 for value in weights)
    except Exception as error:  # whatever a user's code may raise
        raise ValueError(f"{what} fails for {layers} layers{cause(error, file)}") from error
    if not valid or not sum(weights) > 0:
        raise ValueError(
            f"{what} gives {weights} for {layers} layers: expected {layers} weights, finite, not negative, not all zero"
        )


def _check_quantizer(quantizer: Quantizer, operand: Operand, kv_heads: int, head_dim: int) -> None:
    block, file = quantizer.block, _file(quantizer)
    what = f"quantizer {QUANTIZERS.name_of(quantizer)!r}: {operand.kind}"
    hint = "" if quantizer.by_layer else "; operand.layer is None unless the class says by_layer = True"

    def stored(tokens: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        x = jax.ShapeDtypeStruct((_ROWS, kv_heads, tokens, head_dim), jnp.float32)
        return _abstract(what, file, lambda x: quantizer.encode(x, operand), x, hint=hint), x

    (one, x), (three, x_three) = stored(block), stored(3 * block)
    if jax.tree.structure(one) != jax.tree.structure(three) or not jax.tree.leaves(one):
        raise ValueError(f"{what}: expected encode to return the same pytree of arrays for any number of tokens")
    for (path, leaf), other in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(three), strict=True):
        rows = leaf.shape[2] if len(leaf.shape) > 2 else 0
        expected = (_ROWS, kv_heads, 3 * rows, *leaf.shape[3:])
        if leaf.shape[:2] != (_ROWS, kv_heads) or not rows or block % rows or other.shape != expected:
            raise ValueError(
                f"{what}: encode returns{jax.tree_util.keystr(path) or ' an array'} of shape {list(leaf.shape)} for "
                f"{list(x.shape)} and {list(other.shape)} for {list(x_three.shape)}: expected [B, K, S / r, ...] "
                f"in which r divides the block of {block} tokens"
            )
    for given, values in ((one, x), (three, x_three)):
        out = _abstract(what, file, lambda stored: quantizer.decode(stored, operand), given, hint=hint)
        _expect(f"{what}: decode", out, values.shape, "[B, K, S, H]")
    rotation = quantizer.rotation(operand, head_dim)
    if rotation is not None:
        _check_rotation(what, rotation, head_dim)


def _check_rotation(what: str, rotation: Array, head_dim: int) -> None:
    _expect(f"{what}: rotation", rotation, (head_dim, head_dim), "[H, H]")
    matrix = np.asarray(rotation, np.float64)
    error = np.abs(matrix @ matrix.T - np.eye(head_dim)).max()
    if not error < 1e-4:
        raise ValueError(f"{what}: rotation is not orthogonal: R @ R.T differs from 1 by {error:.2g}")


def _abstract(what: str, file: str, function: Callable, *shapes: Any, hint: str = "") -> Any:
    """The output shapes of a component's code, or one error that says where it fails."""
    try:
        return jax.eval_shape(function, *shapes)
    except Exception as error:
        given = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes))
        hint = hint if "NoneType" in str(error) else ""
        raise ValueError(f"{what} fails on {given}{cause(error, file)}{hint}") from error


def _expect(what: str, out: Any, shape: tuple[int, ...], legend: str) -> None:
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise ValueError(f"{what} returns a {type(out).__name__}: expected an array {legend}")
    if out.shape != shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"{what} returns {out.dtype}{list(out.shape)}: expected floating-point {list(shape)}, that is {legend}"
        )


def _file(code: Component | Callable) -> str:
    """The file that defines a component's class, or a function; empty if it defines none."""
    members = vars(type(code)).values() if isinstance(code, Component) else (code,)
    files = (member.__code__.co_filename for member in members if inspect.isfunction(member))
    return next((file for file in files if file != "<string>"), "")  # which dataclasses generate


def cause(error: BaseException, file: str) -> str:
    """` (line 3): TypeError: ...`: the innermost line of `file` on the way to the error, and the error's first line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f" ({pathlib.Path(file).name}, line {lines[-1]})" if lines else ""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{place}: {kind}{(str(error).strip().splitlines() or ['no message'])[0]}"
