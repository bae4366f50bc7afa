"""Tests schemas: accepted contents of files, and one-line errors."""

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from minikv_jax.schemas import Schema, validate


class Inner(Schema, extra="ignore"):
    factor: float = 1.0


class Model(Schema):
    size: Annotated[int, Field(ge=1, le=1000)]
    scale: float = 1.0
    tied: bool = False
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    stops: int | list[int] | None = None
    names: dict[str, str] = Field(default_factory=dict)


def test_a_good_file_becomes_a_value() -> None:
    data = {"size": 3, "scale": 2, "inner": {"factor": 0.5, "else": []}, "stops": [1, 2]}
    model = validate(Model, data, source="config.json")
    assert (model.size, model.scale, model.stops) == (3, 2.0, [1, 2])
    assert model.inner == Inner(factor=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "3"}, "f.json: size is '3'; accepted: an integer"),
        ({"size": 3.0}, "f.json: size is 3.0; accepted: an integer"),
        ({"size": True}, "f.json: size is True; accepted: an integer"),
        ({"size": None}, "f.json: size is None; accepted: an integer"),
        ({"size": 0}, "f.json: size is 0; accepted: at least 1"),
        ({"size": 10**12}, "f.json: size is 1000000000000; accepted: at most 1000"),
        ({"scale": float("nan")}, "f.json: scale is nan; accepted: a finite number"),
        ({"scale": float("inf")}, "f.json: scale is inf; accepted: a finite number"),
        ({"scale": 10**400}, "f.json: scale is 1000"),
        ({"scale": True}, "f.json: scale is True; accepted: a number"),
        ({"tied": 1}, "f.json: tied is 1; accepted: true or false"),
        ({"kind": "c"}, "f.json: kind is 'c'; accepted: 'a' or 'b'"),
        ({"inner": []}, "f.json: inner is []; accepted: an object"),
        ({"inner": {"factor": "2"}}, "f.json: inner.factor is '2'; accepted: a number"),
        ({"stops": "x"}, "f.json: stops is 'x'; accepted: an integer or a list"),
        ({"stops": [1, "x"]}, "f.json: stops[1] is 'x'; accepted: an integer"),
        ({"names": {"\x1b[2J": 3}}, r"f.json: names.'\x1b[2J' is 3; accepted: text"),
        ({"kind": "\x1b]0;title\x07"}, r"f.json: kind is '\x1b]0;title\x07'; accepted: 'a' or 'b'"),
        ({"kind": "x" * 10**6}, "f.json: kind is 'xxx"),
        (
            {"sise": 3, "\n": 4},
            r"f.json: unknown keys 'sise', '\n'; accepted: size, scale, tied, kind, inner, stops, nam",
        ),
        ({"tied": 1, "sise": 3}, "f.json: tied is 1; accepted: true or false (and 1 more)"),
        ({"size": "3", "tied": 1, "kind": 5}, "f.json: size is '3'; accepted: an integer (and 2 more)"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        validate(Model, {"size": 3} | changes, source="f.json")
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 300


def test_missing_keys_and_other_kinds_of_files() -> None:
    class Pair(Schema):
        first: Model
        second: int

    with pytest.raises(ValueError, match=r"^f lacks first\.size, second$"):
        validate(Pair, {"first": {}}, source="f")
    with pytest.raises(ValueError, match=r"^f is \[1\]; accepted: an object$"):
        validate(Pair, [1], source="f")
    with pytest.raises(ValueError, match=r"^f: first: unknown keys 'x'; accepted: size, "):
        validate(Pair, {"first": {"size": 1, "x": 1}, "second": 1}, source="f")


def test_deep_nesting_is_shown_short() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"^f: size is \[\[\[\[\.\.\.\]\]\]\]; accepted: an integer$"):
        validate(Model, {"size": deep}, source="f")
