"""Schema of a method in a file, and its reader, whose errors name the file."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import from_dict, to_dict
from minikv_jax.schemas import Schema

Setting = bool | int | float | str
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Amount = Count | Annotated[float, Field(ge=0, le=1)]


class ComponentRecord(Schema, extra="allow"):
    """A component: its registered name and its settings."""

    __pydantic_extra__: dict[str, Setting]  # pyright: ignore[reportIncompatibleVariableOverride]  (pydantic's own way)

    name: str


class MethodRecord(Schema):
    """A method as written by `registry.to_dict`."""

    name: str
    citation: str
    scorer: ComponentRecord
    budget: ComponentRecord
    quantizer: ComponentRecord | None
    heavy: Amount
    recent: Amount
    sinks: Count
    evict_every: Size | None
    tail: dict[str, Setting]
    refit: ComponentRecord | None
    lookahead: Count
    retrieval_heads: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


def to_method(record: MethodRecord, source: str | os.PathLike[str]) -> Method:
    """Turns a record into a method. Raises ValueError naming `source` and what is unknown, missing or out of range."""
    values = record.model_dump()
    try:
        method = from_dict(values)
    except ValueError as error:
        raise ValueError(f"{os.fspath(source)}: method: {error}") from error
    for part, settings in to_dict(method).items():  # a default in place of a saved value would make another method
        if isinstance(settings, dict) and (missing := [name for name in settings if name not in values[part]]):
            raise ValueError(f"{os.fspath(source)}: method.{part} lacks {', '.join(missing)}")
    return method
