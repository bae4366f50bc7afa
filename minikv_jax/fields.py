"""Fields of frozen dataclasses that say what they accept: the settings of methods, their components and sampling."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np

from minikv_jax.checks import shown

_ACCEPTS = "accepts"  # the key of a field's metadata
_KINDS = {bool: "true or false", float: "a finite number", int: "an integer", str: "text"}


@dataclasses.dataclass(frozen=True)
class Accepts:
    """The values that a field takes: of `kind`, within limits or one of `choices`; None too if it is `optional`."""

    kind: type
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        limits = [f"{word} {limit:.6g}" for word, limit in words.items() if limit is not None]
        if self.kind is int and self.at_least is not None and self.at_most is not None:
            limits = [f"in {self.at_least}..{self.at_most}"]
        return " ".join([_KINDS[self.kind], " and ".join(limits)]).rstrip() + (" or none" if self.optional else "")

    def value(self, name: str, value: Any) -> Any:
        """`value` as Python's own type: equal settings are of equal types, and numpy's are not Python's.

        Raises:
          ValueError: it is not accepted. NaN and infinity never are.
        """
        if self.optional and value is None:
            return None
        plain = value.item() if isinstance(value, np.generic) else value
        if self.kind is float and type(plain) is int:
            with contextlib.suppress(OverflowError):
                plain = float(plain)
        if type(plain) is not self.kind or not self._holds(plain):
            raise ValueError(f"{name}={shown(value)}: expected {self}")
        return plain

    def _holds(self, value: Any) -> bool:
        return (
            (self.kind is not float or math.isfinite(value))
            and (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )


def setting(
    *,
    default: Any = dataclasses.MISSING,
    kind: type | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A field with the values that it accepts.

    Args:
      default: none if the field is required; None if that is accepted too.
      kind: bool, float, int or str; by default that of the default.
    """
    accepted = Accepts(kind or type(default), at_least, above, at_most, choices, optional=default is None)
    return dataclasses.field(default=default, metadata={_ACCEPTS: accepted})


def accepts(field: dataclasses.Field[Any]) -> Accepts | None:
    """What a field takes: without `setting`, anything of its default's type. None if the default is no setting's."""
    if _ACCEPTS in field.metadata:
        return field.metadata[_ACCEPTS]
    return Accepts(type(field.default)) if type(field.default) in _KINDS else None


def check(instance: Any) -> None:
    """Holds the fields of a frozen dataclass's instance against what they accept, and makes them Python's own types.

    Raises:
      ValueError: a value that its field does not accept, naming both.
    """
    for field in dataclasses.fields(instance):
        if (accepted := accepts(field)) is not None:
            object.__setattr__(instance, field.name, accepted.value(field.name, getattr(instance, field.name)))
