"""Looks methods up by name and changes their settings by text, for command lines and files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from minikv_jax.checks import read_integer, read_number, shown
from minikv_jax.methods import calibrated
from minikv_jax.methods.base import Component, settings
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import AMOUNT, HEADS, Amount, Method, to_amount, to_heads
from minikv_jax.methods.registry import COMPONENTS, METHODS, OPTIONAL, make, plain_settings

_PARTS = (*COMPONENTS, "tail")  # fields whose settings can be named without the field


def names() -> tuple[str, ...]:
    """Lists the names of all registered methods, the library's and your own."""
    return tuple(METHODS)


def get(name: str) -> Method:
    """Returns the method registered as `name`, or the one saved in a directory by `minikv calibrate`.

    Args:
      name: a method's name, or a directory.

    Returns:
      The method.

    Raises:
      ValueError: an unknown name; the text lists the known ones. Also a damaged calibration.
    """
    if not isinstance(name, str):
        raise ValueError(f"method {name!r}: expected a name")
    if name in METHODS:
        return METHODS[name]
    if calibrated.is_calibration(name):
        return calibrated.saved_method(name)
    raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}; or a calibration's directory")


def resolve(method: str | Method) -> Method:
    """Returns a method as given, or looks it up by name.

    Args:
      method: a `Method`, a method's name, or the directory of a calibration.

    Returns:
      The method.

    Raises:
      ValueError: an unknown name, or anything else.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        # The type, not the value, which may be a whole cache.
        raise ValueError(f"method is a {type(method).__name__}: expected a Method or a method's name")
    return get(method)


def parse(text: str, changes: Iterable[tuple[str, str]] = ()) -> Method:
    """Reads a method with changes from text, as in `--method h2o:heavy=0.25,recent=0.25`.

    Args:
      text: `NAME` or `NAME:KEY=VALUE,KEY=VALUE`.
      changes: further changes, as for `override`; those in `text` win.

    Returns:
      The changed method.

    Raises:
      ValueError: an unknown method, setting or value.
    """
    name, _, own = text.partition(":")
    merged = dict(changes)
    for setting in filter(None, own.split(",")):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"method {text!r}: expected NAME or NAME:KEY=VALUE,KEY=VALUE, got {setting!r}")
        merged[key] = value
    method = get(name)
    try:
        return override(method, merged)
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from error


def override(method: Method, changes: Mapping[str, str]) -> Method:
    """Changes settings of a method by text, as in `--set heavy=0.5`.

    A key is a field of `Method` (`heavy=0.5` is a share, `heavy=512` a count; `scorer`, `budget`, `quantizer` and
    `refit` take registered names, the last two and `evict_every` also `none`; `retrieval_heads=1.0+5.2` are head 0 of
    layer 1 and head 2 of layer 5) or a setting of one of its components:
    `k_bits`, or `quantizer.k_bits` if two components have it. A new component takes over the settings that it has in
    common with the one it replaces.

    Args:
      method: the method to change; it stays as it is.
      changes: values as text, by key.

    Returns:
      The changed method.

    Raises:
      ValueError: an unknown setting, or a value of the wrong type or out of range; the text names both.
    """
    for key, text in changes.items():
        if not isinstance(text, str):
            raise ValueError(f"{key}={text!r}: expected text, as on the command line; values go to dataclasses.replace")
    drafts = {part: _unchanged(getattr(method, part)) for part in _PARTS}
    for part in COMPONENTS:  # before their settings are looked up
        if part in changes:
            drafts[part] = _replaced(part, getattr(method, part), changes[part])
    owners = {part: draft.values for part, draft in drafts.items()}
    fields: dict[str, Any] = {}
    for key, text in changes.items():
        if key in _PARSERS:
            fields[key] = _PARSERS[key](key, text)
        elif key not in COMPONENTS:
            part, setting = _locate(key, owners)
            owners[part][setting] = _parse_setting(key, text, owners[part][setting])
    return dataclasses.replace(method, **fields, **{part: draft.make(**draft.values) for part, draft in drafts.items()})


class _Draft(NamedTuple):
    """A component to be made once all of its settings are known: the old settings may not suit the new component."""

    make: Callable[..., Component | None]
    values: dict[str, Any]


def _unchanged(component: Component | None) -> _Draft:
    if component is None:
        return _Draft(lambda: None, {})
    values = plain_settings(component)
    return _Draft(lambda **changed: make(type(component), changed) if changed != values else component, values.copy())


def _replaced(part: str, old: Component | None, name: str) -> _Draft:
    """Drafts the component called `name`, with the settings that it shares with `old`."""
    registry = COMPONENTS[part]
    if part in OPTIONAL and name.lower() == "none":
        return _unchanged(None)
    entry = registry[name]
    if not isinstance(entry, type) or type(old) is entry:
        return _unchanged(entry if isinstance(entry, Component) else old)
    shared = {} if old is None else {key: value for key, value in settings(old).items() if key in settings(entry)}
    return _Draft(functools.partial(registry.make, name), settings(entry) | shared)


def _locate(key: str, owners: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Finds the component and the setting that a key names."""
    part, separator, setting = key.partition(".")
    if separator and setting in owners.get(part, ()):
        return part, setting
    having = [part for part, values in owners.items() if key in values]
    if len(having) == 1:
        return having[0], key
    if having:
        raise ValueError(f"setting {key!r} is ambiguous: say {' or '.join(f'{part}.{key}' for part in having)}")
    known = [*COMPONENTS, *_PARSERS, *(f"{part}.{name}" for part, values in owners.items() for name in values)]
    unknown = f"unknown setting {key!r}: expected one of {', '.join(known)}"
    if not owners["quantizer"] and (setting or part) in settings(MinMax):
        unknown += "; the method does not quantise: set quantizer=minmax, or another quantizer, beside it"
    raise ValueError(unknown)


def _parse_setting(key: str, text: str, current: Any) -> Any:
    """Reads text as a value of the current value's type."""
    kind = type(current)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={shown(text)}: expected true or false")
        return text.lower() == "true"
    try:
        return _READERS[kind](text)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from error


def _parse_amount(key: str, text: str) -> Amount:
    try:
        number = read_number(text)
        return to_amount(number if set(text) & set(".eE") else int(text))  # "512" is a count, "0.5" a share
    except ValueError as error:
        raise ValueError(f"{key}={shown(text)}: {AMOUNT}") from error


def _parse_optional(key: str, text: str) -> int | None:
    return None if text.lower() == "none" else _parse_setting(key, text, 0)


def _parse_heads(key: str, text: str) -> tuple[tuple[int, int], ...]:
    """Reads pairs from text: "1.0+5.2" are head 0 of layer 1 and head 2 of layer 5."""
    try:
        pairs = [] if text.lower() == "none" else [pair.split(".") for pair in text.split("+")]
        heads = [(read_integer(layer), read_integer(head)) for layer, head in pairs]
    except ValueError as error:
        raise ValueError(f"{key}={shown(text)}: {HEADS}, as in 1.0+5.2, or none") from error
    return to_heads(heads)


_READERS = {int: read_integer, float: read_number, str: str}
_PARSERS = {
    "name": functools.partial(_parse_setting, current=""),
    "citation": functools.partial(_parse_setting, current=""),
    "heavy": _parse_amount,
    "recent": _parse_amount,
    "sinks": functools.partial(_parse_setting, current=0),
    "evict_every": _parse_optional,
    "lookahead": functools.partial(_parse_setting, current=0),
    "retrieval_heads": _parse_heads,
}
