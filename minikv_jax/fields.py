"""Dataclass fields with checked values: the settings of methods, of their components and of sampling."""

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
    """The values that a field accepts.

    Attributes:
      kind: bool, float, int or str.
      at_least, above, at_most: limits of a number; None for no limit.
      choices: accepted values; empty if all within the limits are accepted.
      optional: whether None is accepted.
    """

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
        """Converts `value` to Python's own type, so that equal settings have equal types.

        Raises:
          ValueError: a value that is not accepted. NaN and infinity never are.
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
    """Declares a setting of a component and the values that it accepts.

    Use it for a field of a `Scorer`, `Budget`, `ScoredBudget` or `Quantizer`:
    `lag: int = minikv_jax.setting(default=128, at_least=1)`. Limits include the value, except `above`.

    Args:
      default: value of the setting if none is given. Components need one; a default of None also accepts None.
      kind: bool, float, int or str; by default the type of `default`. Needed if that is None or missing.
      at_least: smallest accepted number.
      above: accepted numbers are larger than this.
      at_most: largest accepted number.
      choices: the accepted values; by default all within the limits.

    Returns:
      A dataclass field.

    Raises:
      ValueError: raised when an instance is made with a value that is not accepted; the text names the setting, the
        value and what is accepted. NaN and infinity are never accepted.
    """
    accepted = Accepts(kind or type(default), at_least, above, at_most, choices, optional=default is None)
    return dataclasses.field(default=default, metadata={_ACCEPTS: accepted})


def accepts(field: dataclasses.Field[Any]) -> Accepts | None:
    """Looks up what a field accepts: without `setting`, any value of its default's type. None if it is no setting."""
    if _ACCEPTS in field.metadata:
        return field.metadata[_ACCEPTS]
    return Accepts(type(field.default)) if type(field.default) in _KINDS else None


def check(instance: Any) -> None:
    """Checks the fields of a frozen dataclass's instance, and converts their values to Python's own types.

    Raises:
      ValueError: a value that its field does not accept; the text names both.
    """
    for field in dataclasses.fields(instance):
        if (accepted := accepts(field)) is not None:
            object.__setattr__(instance, field.name, accepted.value(field.name, getattr(instance, field.name)))
