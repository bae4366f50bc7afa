"""Registries of components and methods by name, for the command line and for files. Python code needs no names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from minikv_jax.checks import shown
from minikv_jax.methods.base import (
    Budget,
    Component,
    NoScores,
    Quantizer,
    Refit,
    ScoredBudget,
    Scorer,
    Uniform,
    settings,
)
from minikv_jax.methods.method import Method, Share, Tail, to_budget, to_scorer

T = TypeVar("T")
Registered = TypeVar("Registered", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Entries of one kind by name."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._built_in: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(f"{self.kind}={shown(name)}: expected one of {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def add(self, name: str, entry: T) -> None:
        """Registers `entry`. A name of the user's own may be used again, one of the library's may not."""
        if not isinstance(name, str) or not name or set(name) & set(":,=. ") or not name.isprintable():
            raise ValueError(f"{self.kind}={name!r}: expected a name without spaces, ':', ',', '.' and '='")
        if name in self._built_in:
            raise ValueError(f"{self.kind}={name!r} is the library's own: choose another name")
        self._entries[name] = entry

    def seal(self) -> None:
        """Protects the names registered so far."""
        self._built_in = frozenset(self._entries)

    def is_built_in(self, name: str) -> bool:
        """Whether the name was registered when the registry was sealed."""
        return name in self._built_in

    def snapshot(self) -> dict[str, T]:
        """Copies the entries."""
        return dict(self._entries)

    def restore(self, entries: dict[str, T]) -> None:
        """Restores a snapshot."""
        self._entries = dict(entries)


class Components(Registry[type[Component] | Component]):
    """Component classes by name. A registered function is an instance without settings."""

    def make(self, name: str, **values: Any) -> Any:
        """Makes a component with these settings. Raises ValueError naming what is unknown or of the wrong type."""
        entry = self[name]
        try:
            return make(entry, values) if isinstance(entry, type) else entry
        except ValueError as error:
            raise ValueError(f"{self.kind}={name!r}: {error}") from error

    def name_of(self, component: Component) -> str:
        """Name by which a component or its class is registered, else the name of the class or function."""
        for name, entry in self._entries.items():
            if entry == component or entry is type(component):
                return name
        return getattr(getattr(component, "function", type(component)), "__name__", type(component).__name__)


def make(component: type[T], values: Mapping[str, Any]) -> T:
    """Makes an instance of a component class. Raises ValueError for wrong settings or if the class cannot be made."""
    known = settings(component)  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown setting {shown(name)}: expected one of {', '.join(known) or 'none'}")
    try:
        return component(**values)
    except ValueError:
        raise
    except Exception as error:  # an abstract class, or whatever a user's __post_init__ may raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


SCORERS = Components("scorer")
BUDGETS = Components("budget")
QUANTIZERS = Components("quantizer")
REFITS = Components("refit")
METHODS: Registry[Method] = Registry("method")
REGISTRIES: tuple[Registry[Any], ...] = (SCORERS, BUDGETS, QUANTIZERS, REFITS, METHODS)


def register_scorer(name: str) -> Callable[[Registered], Registered]:
    """Registers the decorated scorer for the command line and for files: `--set scorer=NAME`.

    Args:
      name: without spaces, ':', ',', '.' and '='. One of your own names may be used again.

    Returns:
      A decorator for a `Scorer` class, or a function `score(inputs)`. It returns that unchanged.

    Raises:
      ValueError: raised by the decorator for a name that is malformed or the library's own, for anything but a scorer
        or a function, and for a class without defaults for all settings or without `score`.
    """
    return _register(SCORERS, name, (Scorer,), to_scorer)


def register_budget(name: str) -> Callable[[Registered], Registered]:
    """Registers the decorated budget rule for the command line and for files: `--set budget=NAME`.

    Args:
      name: without spaces, ':', ',', '.' and '='. One of your own names may be used again.

    Returns:
      A decorator for a `Budget` or `ScoredBudget` class, or a function `weights(num_layers)`. It returns that
      unchanged.

    Raises:
      ValueError: raised by the decorator for a name that is malformed or the library's own, for anything but a budget
        rule or a function, and for a class without defaults for all settings or without `weights`.
    """
    return _register(BUDGETS, name, (Budget, ScoredBudget), to_budget)


def register_quantizer(name: str) -> Callable[[Registered], Registered]:
    """Registers the decorated quantizer for the command line and for files: `--set quantizer=NAME`.

    Args:
      name: without spaces, ':', ',', '.' and '='. One of your own names may be used again.

    Returns:
      A decorator for a `Quantizer` class. It returns the class unchanged.

    Raises:
      ValueError: raised by the decorator for a name that is malformed or the library's own, for anything but a
        quantizer, and for a class without defaults for all settings or without `encode` and `decode`.
    """
    return _register(QUANTIZERS, name, (Quantizer,), None)


def register_refit(name: str) -> Callable[[Registered], Registered]:
    """Registers the decorated refit of values for the command line and for files: `--set refit=NAME`.

    Args:
      name: without spaces, ':', ',', '.' and '='. One of your own names may be used again.

    Returns:
      A decorator for a `Refit` class. It returns the class unchanged.

    Raises:
      ValueError: raised by the decorator for a name that is malformed or the library's own, for anything but a refit,
        and for a class without defaults for all settings or without `values`.
    """
    return _register(REFITS, name, (Refit,), None)


def _register(
    registry: Components, name: str, bases: tuple[type, ...], convert: Callable[[Any], Component] | None
) -> Callable[[Registered], Registered]:
    expected = " or ".join(base.__name__ for base in bases)

    def register(entry: Registered) -> Registered:
        if isinstance(entry, type) and issubclass(entry, bases):
            try:
                make(entry, {})  # a name makes an instance: every setting needs a default, every abstract method a body
            except ValueError as error:
                raise ValueError(f"{registry.kind}={name!r}: {error}") from error
            registry.add(name, entry)
        elif convert is not None and not isinstance(entry, type) and callable(entry):
            registry.add(name, convert(entry))
        else:
            kind = entry.__name__ if isinstance(entry, type) else type(entry).__name__
            raise ValueError(f"{registry.kind}={name!r} is {kind}: expected a subclass of minikv_jax.{expected}")
        return entry  # pyright: ignore[reportReturnType]  (it is what came in)

    return register


def register_method(method: Method) -> Method:
    """Registers a method under its own name, for the command line, files and `generate(..., method=NAME)`.

    Args:
      method: the method; its `name` is without spaces, ':', ',', '.' and '='. One of your own names may be used again.

    Returns:
      `method`, unchanged.

    Raises:
      ValueError: not a `Method`, or a name that is malformed or the library's own.
    """
    if not isinstance(method, Method):
        raise ValueError(f"method {method!r}: expected a Method, whose name it is registered by")
    METHODS.add(method.name, method)
    return method


def seal() -> None:
    """Protects everything registered so far. Called after the library's own methods are imported."""
    for registry in REGISTRIES:
        registry.seal()


def to_dict(method: Method) -> dict[str, Any]:
    """Turns a method into JSON values: components by name with their settings. `from_dict` reads them back."""
    values: dict[str, Any] = {"name": method.name, "citation": method.citation}
    for field, registry in COMPONENTS.items():
        component = getattr(method, field)
        values[field] = None if component is None else {"name": registry.name_of(component)} | plain_settings(component)
    for field in ("heavy", "recent"):
        budget = getattr(method, field)
        values[field] = budget.fraction if isinstance(budget, Share) else budget.count
    for field in ("sinks", "evict_every", "lookahead"):
        values[field] = getattr(method, field)
    values["retrieval_heads"] = [list(pair) for pair in method.retrieval_heads]
    return values | {"tail": settings(method.tail)}


def plain_settings(component: Component) -> dict[str, Any]:
    """Returns the settings of an instance, without a registered function."""
    return {name: value for name, value in settings(component).items() if not callable(value)}


def from_dict(values: Mapping[str, Any]) -> Method:
    """Reads the values of `to_dict`. Raises ValueError naming what is unknown, missing or of the wrong type."""
    expected = {field.name for field in dataclasses.fields(Method)}
    if set(values) != expected:
        unknown, missing = sorted(set(values) - expected), sorted(expected - set(values))
        raise ValueError(f"not a method: unknown fields {unknown}, missing fields {missing}")
    components = {field: _component(field, values[field]) for field in (*COMPONENTS, "tail")}
    return Method(**dict(values) | components)


def _component(field: str, given: Any) -> Any:
    if given is None and field in OPTIONAL:
        return None
    if not isinstance(given, Mapping) or (field != "tail" and "name" not in given):
        raise ValueError(f"{field}={given!r}: expected a name and settings")
    if field == "tail":
        return make(Tail, given)
    values = dict(given)
    return COMPONENTS[field].make(values.pop("name"), **values)


COMPONENTS: dict[str, Components] = {"scorer": SCORERS, "budget": BUDGETS, "quantizer": QUANTIZERS, "refit": REFITS}
OPTIONAL = ("quantizer", "refit")  # components that may be None
SCORERS.add("none", NoScores)
BUDGETS.add("uniform", Uniform)
