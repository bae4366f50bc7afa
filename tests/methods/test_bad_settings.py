"""Tests wrong settings, generated from the fields of all components: each raises one error naming the field."""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from support.commands import Run, run_wrongly

import minikv_jax as mk
from minikv_jax import fields
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Component, NoScores
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.knorm import KNorm
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.registry import BUDGETS, QUANTIZERS, SCORERS

NO_NUMBERS = ["1", None, True, [1], 1j, "", b"1", np.ones(2)]
WRONG: dict[type, list[Any]] = {
    int: [*NO_NUMBERS, 1.5, 2.0, float("nan"), np.float32(2), 10**400],
    float: [*NO_NUMBERS, float("nan"), float("inf"), -float("inf"), 10**400, np.float32("nan")],
    str: [1, None, True, 1.5, b"float16", ["float16"]],
    bool: [1, 0, "true", None, np.ones(2, bool)],
}
WRONG_TEXT: dict[type, list[str]] = {
    int: [
        "",
        " 1",
        "1 ",
        "1.0",
        "1e3",
        "nan",
        "inf",
        "0x10",
        "1_0",
        "٤",
        "²",
        "１６",
        "--1",
        "1" * 400,
        "none",
        "true",
    ],
    float: ["", " 1", "nan", "-nan", "inf", "Infinity", "1e999", "1_0.5", "٠.٥", "½", "1.0.0", "0x1p3", "1,5", "none"],
    str: ["nosuch", "", " float16", "FLOAT16"],
    bool: ["1", "yes", "", "ｔｒｕｅ"],
}


def beyond(accepted: Any) -> Iterator[Any]:
    """Lists values of the right type that a field rejects."""
    if accepted.choices:
        yield from ["nosuch", "", accepted.choices[0].upper()] if accepted.kind is str else [0, -1, 5, 7, 10**12]
        return
    steps = [1, 10**6, 10**12] if accepted.kind is int else [1e-6, 1.0, 1e30]
    for bound, sign in ((accepted.at_least, -1), (accepted.at_most, 1)):
        if bound is not None:
            yield from (bound + sign * step for step in steps)
    if accepted.above is not None:
        yield from (accepted.above, accepted.above - 1)


def held_components() -> Iterator[tuple[str, type[Component], Method]]:
    """Lists every component with settings, its key for `--set`, and a method with it."""
    base = Method(scorer=KNorm(), heavy=4, recent=4)
    for registry, part in ((SCORERS, "scorer"), (BUDGETS, "budget"), (QUANTIZERS, "quantizer")):
        for kind in map(registry.__getitem__, registry):
            if isinstance(kind, type):
                heavy = {"heavy": 0} if kind is NoScores else {}
                yield part, kind, dataclasses.replace(base, **{part: kind()} | heavy)
    yield "tail", Tail, dataclasses.replace(base, quantizer=mk.MinMax())


def choices(kind: Any, field: dataclasses.Field[Any]) -> fields.Accepts:
    """Returns the accepted values of a field, including a quantizer's bits."""
    accepted = fields.accepts(field)
    assert accepted is not None, f"{kind.__name__}.{field.name}"
    if issubclass(kind, mk.Quantizer) and field.name in ("k_bits", "v_bits"):
        accepted = dataclasses.replace(accepted, choices=kind.choices)
    return accepted


def values(accepted: fields.Accepts) -> list[Any]:
    wrong = [*WRONG[accepted.kind], *beyond(accepted)]
    return [value for value in wrong if not (accepted.optional and value is None)]


class Case(NamedTuple):
    """A field's name in errors, a wrong value, and the call with that value."""

    owner: str
    name: str
    value: str
    call: Callable[[], Any]


def constructor_cases() -> Iterator[Case]:
    """Makes the cases of wrong settings in Python."""
    components: list[tuple[Any, dict[str, Any]]] = [(kind, {}) for _, kind, _ in held_components()]
    sampling, packing = {"temperature": 1.0}, {"bits": 2, "group_size": 16, "axis": "tokens"}
    for kind, rest in (*components, (mk.Sampling, sampling), (mk.Packing, packing), (mk.Tokens, {}), (Method, {})):
        for field in dataclasses.fields(kind):
            if fields.accepts(field) is None:
                continue  # a component of a method
            for value in values(choices(kind, field)):
                call = functools.partial(kind, **rest | {field.name: value})
                yield Case(kind.__name__, field.name, f"{value!r:.40}", call)


def text_cases() -> Iterator[Case]:
    """Makes the cases of wrong settings on the command line."""
    for part, kind, method in held_components():
        for field in dataclasses.fields(cast(Any, kind)):
            accepted = choices(kind, field)
            if accepted.kind is str and not accepted.choices:
                continue  # any text will do
            for text in [*WRONG_TEXT[accepted.kind], *map(str, beyond(accepted))]:
                call = functools.partial(lookup.override, method, {f"{part}.{field.name}": text})
                yield Case(kind.__name__, field.name, f"{text!r:.40}", call)
    scored = Method(scorer=H2O(), heavy=4, recent=4)
    amounts = [*WRONG_TEXT[float], "-1", "1.5", "-0.1", "16777217", "1e3", "9" * 30, "1.0000001"]
    counts = [*WRONG_TEXT[int], "-1", "16777217", "100000000000"]
    counts_or_none = ["0", *(text for text in counts if text != "none")]
    for name, texts in (("heavy", amounts), ("recent", amounts), ("sinks", counts), ("evict_every", counts_or_none)):
        for text in texts:
            yield Case("Method", name, f"{text!r:.40}", functools.partial(lookup.override, scored, {name: text}))


def problem(name: str, call: Callable[[], Any]) -> str:
    """Describes what is wrong with the library's error; empty if it is one error that names the field."""
    try:
        call()
    except ValueError as error:
        text, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
        if type(error) is not ValueError or "/minikv_jax/" not in last.filename:
            return f"{type(error).__name__} in {last.filename}: {text[:100]}"
        return "" if name in text and "\n" not in text and len(text) < 400 else f"says {text[:300]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"


@pytest.mark.parametrize("make", [constructor_cases, text_cases])
def test_wrong_settings_are_one_error_each(make: Callable[[], Iterator[Case]]):
    cases = list(make())
    failures = [f"{case[:3]}: {text}" for case in cases if (text := problem(case.name, case.call))]
    print(f"{len(cases)} wrong settings of {len({case[:2] for case in cases})} fields")
    assert failures == []
    assert len(cases) >= 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "expected-attention:future=0"], "future=0: expected an integer in 1..65536"),
        (
            ["--method", "kivi-2", "--set", "quantizer=hqq", "--set", "iterations=-5"],
            "iterations=-5: expected an integer",
        ),
        (["--method", "kivi-2:quantizer=hqq,norm=nan"], "norm='nan': expected a finite number"),
        (["--method", "snapkv:pooling_kernel=999999999"], "pooling_kernel=999999999: expected an integer in 1..4095"),
        (["--method", "snapkv:pooling_kernel=8"], "pooling_kernel=8: expected an odd number"),
        (["--set", "sinks=100000000000"], "sinks=100000000000: expected an integer in 0..16777216"),
        (["--set", "sinks=٤"], "sinks='٤': expected an integer"),
        (["--set", "heavy=٠.٢"], "heavy='٠.٢': expected a share"),
        (["--temperature", "nan"], "argument --temperature: 'nan': expected a finite number"),
        (["--temperature", "1", "--top-k", "٤"], "argument --top-k: '٤': expected an integer"),
        (["--max-new-tokens", "1_0"], "argument --max-new-tokens: '1_0': expected an integer"),
        (["--seed", "²"], "argument --seed: '²': expected an integer"),
    ],
)
def test_wrong_options_are_refused_before_the_model_loads(run: Run, options: list[str], message: str):
    """The model does not exist, which goes unnoticed."""
    assert message in run_wrongly(run, "generate", "--model", "no/such/model", "--prompt", "x", *options)
