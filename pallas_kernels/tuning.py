"""Configs of tunable kernels, and the recorded winners.

No field of a `Config` changes what a kernel computes. A kernel runs the config it is given; without one, the winner
recorded for the kind of device (`tuned.json`, written by `python -m pallas_kernels.autotune`); without a record, its
heuristic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TypeVar

from pallas_kernels import hopper

WINNERS = pathlib.Path(__file__).parent / "tuned.json"


def choice(*allowed: Any, default: Any) -> Any:
    """A field of a `Config` with its values: those that are accepted, which autotuning tries."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every kernel's configuration; each field is a `choice`.

    Raises:
      ValueError: naming a value that is not allowed, and the allowed ones.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if value not in allowed:
                raise ValueError(f"{field.name}={value}: expected {' or '.join(map(str, allowed))}")


C = TypeVar("C", bound=Config)


def candidates(config: type[C]) -> Iterator[C]:
    """Every combination of the fields' values."""
    fields = dataclasses.fields(config)
    for values in itertools.product(*(field.metadata["allowed"] for field in fields)):
        yield config(**{field.name: value for field, value in zip(fields, values, strict=True)})


@functools.cache
def recorded() -> list[dict[str, Any]]:
    """The records of `tuned.json`: op, device, case and config, and how they were measured."""
    return json.loads(WINNERS.read_text())


def winner(op: str, config: type[C], **case: int) -> C | None:
    """The config recorded for an op and a case (head_dim, bits) on this kind of device, or None."""
    for record in recorded():
        if (record["op"], record["device"], record["case"]) == (op, hopper.device_kind(), case):
            return config(**record["config"])
    return None
