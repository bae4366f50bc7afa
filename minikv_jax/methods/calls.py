"""Calls a method's components and checks every result against the component's contract.

Components may be a user's own code. If it raises, or returns a wrong result, one ValueError names the component, the
line, its inputs and the expected result.
"""

from __future__ import annotations

import inspect
import itertools
import math
import pathlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods.base import (
    MAX_WINDOW,
    Budget,
    Component,
    FunctionBudget,
    FunctionScorer,
    KeptTokens,
    LayerInputs,
    Operand,
    Quantizer,
    Refit,
    ScoredBudget,
    Scorer,
)
from minikv_jax.methods.registry import BUDGETS, QUANTIZERS, REFITS, SCORERS
from minikv_jax.models.config import ModelConfig


def vote_windows(scorer: Scorer) -> tuple[int, ...]:
    """Reads `Scorer.vote_windows`, and checks `Scorer.vote_power`."""
    what = f"scorer {SCORERS.name_of(scorer)!r}: vote_windows"
    sizes = _run(what, scorer.score, lambda: tuple(scorer.vote_windows))
    if not all(type(size) is int and 1 <= size <= MAX_WINDOW for size in sizes):
        raise ValueError(f"{what} is {sizes}: expected numbers of queries in 1..{MAX_WINDOW}")
    if type(scorer.vote_power) is not int or scorer.vote_power < 1:
        name = SCORERS.name_of(scorer)
        raise ValueError(f"scorer {name!r}: vote_power is {scorer.vote_power!r}: expected at least 1")
    return sizes


def first_share(scorer: Scorer) -> float:
    """Reads `Scorer.first_share`."""
    what = f"scorer {SCORERS.name_of(scorer)!r}: first_share"
    share = _run(what, scorer.score, lambda: scorer.first_share)
    if not isinstance(share, float | int) or not 0 <= share <= 1:
        raise ValueError(f"{what} is {share!r}: expected a number in 0..1")
    return float(share)


def score(scorer: Scorer, inputs: LayerInputs) -> Float[Array, "B K T"]:
    """Calls `Scorer.score`."""
    batch, tokens, kv_heads, _ = inputs.k.shape
    what = f"scorer {SCORERS.name_of(scorer)!r}"
    code = scorer.function if isinstance(scorer, FunctionScorer) else scorer.score
    out = _run(what, code, scorer.score, inputs)
    return _expect(what, code, out, (batch, kv_heads, tokens), "[B, K, T]")


def rescore(scorer: Scorer, inputs: LayerInputs, scores: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
    """Calls `Scorer.rescore`."""
    what = f"scorer {SCORERS.name_of(scorer)!r}: rescore"
    out = _run(what, scorer.rescore, scorer.rescore, inputs, scores)
    return _expect(what, scorer.rescore, out, scores.shape, "[B, K, T]")


def refit(refit: Refit, inputs: LayerInputs, kept: KeptTokens) -> Float[Array, "B K M H"]:
    """Calls `Refit.values`."""
    what = f"refit {REFITS.name_of(refit)!r}"
    out = _run(what, refit.values, refit.values, inputs, kept)
    return _expect(what, refit.values, out, kept.values.shape, "[B, K, M, H]")


def update(scorer: Scorer, scores: Float[Array, "B K C"], weights: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
    """Calls `Scorer.update`."""
    what = f"scorer {SCORERS.name_of(scorer)!r}: update"
    out = _run(what, scorer.update, scorer.update, scores, weights)
    return _expect(what, scorer.update, out, scores.shape, "[B, K, C]")


def layer_weights(budget: Budget, num_layers: int) -> tuple[float, ...]:
    """Calls `Budget.weights`. The weights are Python numbers, even while a program is traced."""
    what = f"budget {BUDGETS.name_of(budget)!r}"
    code = budget.function if isinstance(budget, FunctionBudget) else budget.weights

    def read() -> tuple[float, ...]:
        with jax.ensure_compile_time_eval():  # a rule may use jax.numpy, also while a program is traced
            return tuple(float(0.0 + weight) for weight in itertools.islice(budget.weights(num_layers), num_layers + 1))

    weights = _run(f"{what}: {num_layers} layers", code, read)
    valid = len(weights) == num_layers and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not valid or not sum(weights) > 0:
        shown = ", ".join(map(str, weights[:8])) + (", ..." if len(weights) > 8 else "")
        raise ValueError(
            f"{what} gives [{shown}] for {num_layers} layers{_place(code)}: expected {num_layers} weights, finite, not "
            "negative, not all zero"
        )
    return weights


def scored_weights(
    budget: ScoredBudget, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]
) -> Float[Array, "L B"]:
    """Calls `ScoredBudget.weights`."""
    what = f"budget {BUDGETS.name_of(budget)!r}"
    out = _run(what, budget.weights, budget.weights, scores, lengths)
    return _expect(what, budget.weights, out, (len(scores), *lengths.shape), "[L, B]")


def check_model(quantizer: Quantizer, model: ModelConfig) -> None:
    """Calls `Quantizer.check`. Raises ValueError if it does not fit the model, or the OSError of a file."""
    try:
        quantizer.check(model)
    except (ValueError, OSError):
        raise
    except Exception as error:
        what = f"quantizer {QUANTIZERS.name_of(quantizer)!r}: check"
        raise ValueError(f"{what} fails{cause(error, _file(quantizer.check))}") from error


def encode(quantizer: Quantizer, x: Float[Array, "B K S H"], operand: Operand) -> Any:
    """Calls `Quantizer.encode`."""
    what = _quantizer(quantizer, operand)
    stored = _run(what, quantizer.encode, quantizer.encode, x, operand, hint=_hint(quantizer))
    batch, kv_heads, tokens, _ = x.shape
    leaves = [] if isinstance(stored, Iterator) else jax.tree.leaves_with_path(stored)
    for path, leaf in leaves or [((), stored)]:
        shape = getattr(leaf, "shape", ())
        rows = shape[2] if len(shape) > 2 else 0
        if shape[:2] != (batch, kv_heads) or not rows or tokens % rows or quantizer.block % (tokens // rows):
            found = f"{leaf.dtype}{list(shape)}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
            raise ValueError(
                f"{what}: encode returns {found}{jax.tree_util.keystr(path)} for {list(x.shape)}"
                f"{_place(quantizer.encode)}: expected arrays [B, K, S / r, ...] in which r divides the block of "
                f"{quantizer.block} tokens"
            )
    return stored


def decode(quantizer: Quantizer, stored: Any, operand: Operand, shape: tuple[int, ...]) -> Float[Array, "B K S H"]:
    """Calls `Quantizer.decode`. `shape` is the expected shape, or that of the leading axes."""
    what = _quantizer(quantizer, operand)
    out = _run(what, quantizer.decode, quantizer.decode, stored, operand, hint=_hint(quantizer))
    full = (*shape, *getattr(out, "shape", ())[len(shape) :])
    return _expect(f"{what}: decode", quantizer.decode, out, full, "[B, K, S, H]")


def rotation(quantizer: Quantizer, operand: Operand, head_dim: int) -> Float[Array, "H H"] | None:
    """Calls `Quantizer.rotation`."""
    what, code = f"{_quantizer(quantizer, operand)}: rotation", quantizer.rotation
    out = _run(what, code, code, operand, head_dim)
    return None if out is None else _expect(what, code, out, (head_dim, head_dim), "[H, H]")


def _quantizer(quantizer: Quantizer, operand: Operand) -> str:
    return f"quantizer {QUANTIZERS.name_of(quantizer)!r}: {operand.kind}"


def _hint(quantizer: Quantizer) -> str:
    return "" if quantizer.by_layer else "; operand.layer is None unless the class says by_layer = True"


def _run(what: str, code: Callable, function: Callable, *given: Any, hint: str = "") -> Any:
    """Calls `function(*given)`. Any exception becomes one ValueError that says where `code` fails."""
    try:
        return function(*given)
    except Exception as error:  # whatever a user's code may raise
        arrays = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(given) if hasattr(leaf, "dtype")]
        hint = hint if "NoneType" in str(error) else ""
        on = f" on {', '.join(arrays)}" if arrays else ""
        raise ValueError(f"{what} fails{on}{cause(error, _file(code))}{hint}") from error


def _expect(what: str, code: Callable, out: Any, shape: tuple[int, ...], legend: str) -> Array:
    if not isinstance(out, jax.Array) and not hasattr(out, "dtype"):
        raise ValueError(f"{what} returns a {type(out).__name__}{_place(code)}: expected an array {legend}")
    if out.shape != shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"{what} returns {out.dtype}{list(out.shape)}{_place(code)}: expected floating-point {list(shape)}, that "
            f"is {legend}"
        )
    return out


def _file(code: Callable) -> str:
    """Finds the file of a function, or of its component class; an empty string if unknown."""
    component = getattr(code, "__self__", None)
    members = vars(type(component)).values() if isinstance(component, Component) else (inspect.unwrap(code),)
    files = (member.__code__.co_filename for member in members if inspect.isfunction(member))
    return next((file for file in files if file != "<string>"), "")  # generated by dataclasses


def _place(code: Callable) -> str:
    """Formats the place where a function is defined: ` (plugin.py, line 3)`."""
    function = inspect.unwrap(getattr(code, "__func__", code))
    if not inspect.isfunction(function):
        return ""
    return f" ({pathlib.Path(function.__code__.co_filename).name}, line {function.__code__.co_firstlineno})"


def cause(error: BaseException, file: str) -> str:
    """Formats an error with the innermost line of `file` in its traceback: ` (plugin.py, line 3): TypeError: ...`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f" ({pathlib.Path(file).name}, line {lines[-1]})" if lines else ""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    try:
        text = str(error).strip()
    except Exception:  # a user's exception may fail in __str__
        text = ""
    return f"{place}: {kind}{(text.splitlines() or ['no message'])[0][:300]}"
