"""Schemas of input files: pydantic models, and errors of one line that say what is wrong with a file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pydantic

from minikv_jax import checks

_Model = TypeVar("_Model", bound=pydantic.BaseModel)

# Accepted values of a key, by pydantic's type of the error. Values in braces come from the error.
_ACCEPTED = {
    "bool_type": "true or false",
    "dataclass_exact_type": "an object",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "string_unicode": "text",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
    "tuple_type": "a list",
}


class Schema(pydantic.BaseModel):
    """Base of the schemas: keys of a file and the types of their values.

    Nothing is converted: "1", 1.0 and true are no integers, and NaN is no number. Unknown keys are refused. Files that
    others may extend ignore them: `class Name(Schema, extra="ignore")`.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, data: Any, handler: Any) -> Any:
        """Lists the known keys in the error if unknown keys are the only mistake."""
        try:
            return handler(data)
        except pydantic.ValidationError as error:
            unknown = [one["loc"] for one in error.errors(include_url=False) if one["type"] == "extra_forbidden"]
            if len(unknown) < error.error_count():
                raise
            known = ", ".join(field.alias or name for name, field in cls.model_fields.items())
            names = ", ".join(checks.shown(key) for (key,) in unknown)
            raise ValueError(f"unknown keys {names}; accepted: {known}") from error


def validate(model: type[_Model], data: object, *, source: str | os.PathLike[str], within: str = "") -> _Model:
    """Checks the content of a file against a schema and returns it as a value of that schema.

    Args:
      model: a `Schema`.
      data: the content, from a JSON parser for instance.
      source: the file, for errors; with the line if it has many.
      within: name of `data` in the file if it is only a part of it; errors put it before the key.

    Raises:
      ValueError: `data` does not fit: "<source>: <key> is <value>; accepted: <what>", in one line. Names and values are
        escaped and shortened.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise ValueError(f"{checks.printable(os.fspath(source))}{_reason(error, data, within)}") from error


@functools.cache
def of(dataclass: type) -> type[Schema]:
    """Makes the schema of a dataclass from its fields' annotations, which may carry bounds, and defaults."""
    kinds = typing.get_type_hints(dataclass, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (kinds[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(dataclass)
    }
    return pydantic.create_model(dataclass.__name__, __base__=Schema, **fields)


def check_fields(value: Any) -> None:
    """Checks the fields of a frozen dataclass against their annotations, and replaces NumPy's numbers by Python's.

    Raises:
      ValueError: a field that does not fit, by name.
    """
    kind = type(value)
    values = {name: field.item() if isinstance(field, np.generic) else field for name, field in vars(value).items()}
    for name, field in validate(of(kind), values, source=kind.__name__):
        object.__setattr__(value, name, field)


@contextlib.contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the name of a file before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checks.printable(os.fspath(source))}: {error}") from error


def _reason(error: pydantic.ValidationError, data: object, within: str) -> str:
    """The error's text after the name of the file: the missing keys, or the first key with a wrong value."""
    problems = [(_keys(data, one["loc"]), one) for one in error.errors(include_url=False)]
    if missing := [_path([*keys, one["loc"][-1]], within) for keys, one in problems if one["type"] == "missing"]:
        return f" lacks {', '.join(dict.fromkeys(missing))}"
    problems.sort(key=lambda problem: problem[1]["type"] == "extra_forbidden")
    first = problems[0][0]
    # Each branch of a union reports an error. The deepest ones come from the branch that was meant.
    keys, one = max((p for p in problems if p[0][: len(first)] == first), key=lambda problem: len(problem[0]))
    accepted = " or ".join(dict.fromkeys(_accepted(other) for at, other in problems if at == keys))
    others = len({tuple(at) for at, _ in problems if at[: len(first)] != first})
    more = f" (and {others} more)" if others else ""
    where = f": {path}" if (path := _path(keys, within)) else ""
    if one["type"] in ("value_error", "assertion_error") and (not keys or accepted.startswith("unknown keys ")):
        return f"{where}: {accepted}{more}"
    return f"{where} is {checks.shown(one['input'])}; accepted: {accepted}{more}"


def _accepted(error: Any) -> str:
    template = _ACCEPTED.get(error["type"])
    if template is not None:
        return template.format(**error.get("ctx", {}))
    return checks.printable(re.sub(r"^(Input should be|Value error,|Assertion failed,) ", "", error["msg"]))


def _keys(data: Any, location: Sequence[str | int]) -> list[str | int]:
    """Keys and indices of a location in `data`, without pydantic's names for the branches of a union."""
    keys: list[str | int] = []
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            continue
        keys.append(part)
    return keys


def _path(keys: Sequence[str | int], within: str) -> str:
    """Joins keys as in `layers.name[3]`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{_name(key)}" for key in keys)
    return "".join((within, *parts)).removeprefix(".")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[\w.-]{1,80}", key) else checks.shown(key)
