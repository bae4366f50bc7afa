"""Argument checks that several modules share: one clear error, before any work starts."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence

import numpy as np

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Checks that `value` is an integer in `least..most`, and returns it as a Python int.

    Raises:
      ValueError: not an integer, or out of range. Without `most` there is no upper limit.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}={shown(value)}: expected an integer")
    if value < least:
        raise ValueError(f"{name}={shown(value)}: expected at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={shown(value)}: expected at most {most}")
    return int(value)


def at_least(least: int, **values: object) -> None:
    """Checks that every value is None or an integer of at least `least`.

    Raises:
      ValueError: a value that is neither, with its name.
    """
    for name, value in values.items():
        if value is not None:
            integer(name, value, least)


def number(name: str, value: object) -> None:
    """Checks that `value` is a number.

    Raises:
      ValueError: not a number. Booleans are none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name}={shown(value)}: expected a number")


def flag(name: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={shown(value)}: expected True or False")


def choice(name: str, value: object, choices: tuple) -> None:
    """Checks that `value` is one of `choices`.

    Raises:
      ValueError: another value.
    """
    if value not in choices or isinstance(value, bool | float):  # True equals 1, and 2.0 equals 2
        raise ValueError(f"{name}={shown(value)}: expected one of {', '.join(map(str, choices))}")


def printable(text: str) -> str:
    """Escapes control and other invisible characters, which names from a file may hold."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(value: object) -> str:
    """Shortens a value's `repr`, in which control characters are escaped."""
    return re.sub(r"\s*\n\s*", " ", _SHORT.repr(value))  # arrays have lines


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def read_integer(text: str) -> int:
    """Reads an integer in ASCII digits. Python's `int` also accepts other scripts, spaces and underscores.

    Raises:
      ValueError: not such an integer.
    """
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{shown(text)}: expected an integer")
    return int(text)


def read_number(text: str) -> float:
    """Reads a finite number in ASCII digits.

    Raises:
      ValueError: not such a number.
    """
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError(f"{shown(text)}: expected a finite number")
    return float(text)


def listed(names: Sequence[str]) -> str:
    """Joins names from a file for an error message: escaped, shortened, and at most `_MOST_NAMES` of them."""
    short = [name if len(name) <= _MOST_REASON else f"{name[:_MOST_REASON]}..." for name in names[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return printable(", ".join(short)) + more


def reason(error: BaseException) -> str:
    """Turns the message of another library's exception into one printable line of limited length."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _MOST_REASON else f"{text[:_MOST_REASON]}..."


_MOST_REASON = 300  # characters
_MOST_NAMES = 100
