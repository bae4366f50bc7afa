"""Damages files reproducibly: wrong values in JSON, and wrong bytes anywhere."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Path = tuple[str | int, ...]


def deep(levels: int) -> list[Any]:
    """Makes lists nested `levels` deep."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    10**12,
    -(10**12),
    10**400,
    0.0,
    1.5,
    -0.5,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "7",
    "1.5",
    "none",
    "\x1b[2J\n\x00",
    "\u202eüß\U0001f600",
    "\ud800",
    "x" * 100_000,
    "١٢",
    [],
    [0],
    ["a"],
    [[]],
    [None] * 3,
    deep(50),
    deep(900),
    {},
    {"name": "none"},
    {"a": {"b": {}}},
)


class Mutation(NamedTuple):
    """A wrong value in a JSON document.

    Attributes:
      what: "value", "missing", "unknown", "twice" or "deep".
      path: path of the wrong key, with the indices of lists.
      old, new: the values at `path`, if any.
      text: the whole document as JSON.
    """

    what: str
    path: Path
    old: Any
    new: Any
    text: str


def nodes(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every nested value with its path."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def mutate(value: Any, generator: random.Random) -> Mutation:
    """Puts one wrong value somewhere in a JSON object."""
    value = copy.deepcopy(value)
    what = generator.choice(["value"] * 6 + ["missing", "unknown", "twice", "deep"])
    everything = list(nodes(value))
    dicts = [(path, node) for path, node in everything if isinstance(node, dict) and (what == "unknown" or node)]
    if what == "value" or not dicts:
        path, old = generator.choice(everything[1:] or everything)
        new = generator.choice(VALUES)
        return Mutation("value", path, old, new, dumps(_replaced(value, path, new)))
    path, node = generator.choice(dicts)
    key = generator.choice(list(node)) if node else ""
    if what == "missing":
        old = node.pop(key)
        return Mutation(what, (*path, key), old, None, dumps(value))
    if what == "unknown":
        key = generator.choice(["more", "", "\x1b[2J", "x" * 1000, "namé"])
        node[key] = generator.choice((1, "x", None, {}))
        return Mutation(what, (*path, key), None, node[key], dumps(value))
    old, mark = node[key], "@mark@"
    node[key] = mark
    text = dumps(value)
    place = f"{json.dumps(key)}: {json.dumps(mark)}"
    if what == "twice":
        twice = f"{json.dumps(key)}: {json.dumps(old)}"
        return Mutation(what, (*path, key), old, old, text.replace(place, f"{twice}, {twice}"))
    nested = "[" * 100_000 + "]" * 100_000
    return Mutation(what, (*path, key), old, [], text.replace(place, f"{json.dumps(key)}: {nested}"))


def dumps(value: Any) -> str:
    """Writes JSON, with infinity as other programs do: as a number that is too large."""
    return json.dumps(value).replace("Infinity", "1e999")


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    node = value
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return value


def kind(value: Any) -> str:
    return "number" if isinstance(value, float) else type(value).__name__


class Format(NamedTuple):
    """What a format accepts besides values of the same kinds as in a valid file. Paths have no indices.

    Attributes:
      kinds: more kinds of a key's value.
      free: keys that hold anything.
      optional: keys that may be missing.
      maps: keys of objects with arbitrary keys.
      any_integer: keys with integers of any size.
      is_open: whether unknown keys are ignored.
    """

    kinds: Mapping[str, tuple[str, ...]] = {}
    free: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    any_integer: tuple[str, ...] = ()
    is_open: bool = False

    def refuses(self, mutation: Mutation) -> bool:
        """Tells whether a file with this mutation must be refused; other files may be."""
        name = ".".join(key for key in mutation.path if isinstance(key, str))
        if mutation.what in ("twice", "deep"):
            return True
        if any(name == free or name.startswith(f"{free}.") for free in self.free):
            return "\ud800" in mutation.text.encode("ascii", "ignore").decode("unicode_escape", "ignore")
        if mutation.what in ("missing", "unknown") and name.rpartition(".")[0] in self.maps:
            return mutation.what == "unknown" and not isinstance(mutation.new, int | str)
        if mutation.what == "missing":
            return name not in self.optional
        if mutation.what == "unknown":
            return not self.is_open
        kinds = {kind(mutation.old), *self.kinds.get(name, ())}
        new = mutation.new
        if kind(new) not in kinds and not (kind(new) == "int" and "number" in kinds):
            return True
        if isinstance(new, float) and not math.isfinite(new):
            return True
        if type(new) is int and name not in self.any_integer and not 0 <= new < 1 << 60:
            return True
        if isinstance(new, list) and mutation.old:
            inner = {kind(item) for item in mutation.old} | set(self.kinds.get(f"{name}[]", ()))
            return not {kind(item) for item in new} <= inner
        return new == "\ud800"


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flips, cuts off, doubles, overwrites or inserts some bytes."""
    place = generator.randrange(max(1, len(content)))
    length = generator.choice((1, 2, 7, 64, len(content) // 2 or 1))
    random_bytes = generator.randbytes(length)
    choice = generator.randrange(7)
    if choice == 0:
        return content[:place]
    if choice == 1:
        return content[:place] + content[place + length :]
    if choice == 2:
        return content[:place] + random_bytes + content[place:]
    if choice == 3:
        return content[:place] + content[place : place + length] + content[place:]
    if choice == 4:
        return content[:place] + bytes(length) + content[place + length :]
    if choice == 5:
        return content + random_bytes
    flipped = bytearray(content or b"x")
    for _ in range(generator.choice((1, 1, 2, 8))):
        flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    return bytes(flipped)
