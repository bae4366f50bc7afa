"""Reads the text of a compiled XLA program: which instruction has which name, scope and order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLEES = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """An instruction of a compiled program.

    Attributes:
      name: its name in the program.
      opcode: its operation, such as "fusion".
      op_name: the JAX operation that it comes from, after its named scopes; "" if XLA made it up.
      target: what a custom call calls, otherwise "".
      callees: names of the computations that it runs.
      trips: how often a loop runs its body, 1 if unknown.
    """

    name: str
    opcode: str
    op_name: str
    target: str
    callees: tuple[str, ...]
    trips: int


class Program:
    """A compiled program, from its text (`jax.stages.Compiled.as_text`)."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._entry, own = "", list[Instruction]()
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                own = self._computations.setdefault(match["name"], [])
                self._entry = match["name"] if match["entry"] else self._entry
            elif match := _INSTRUCTION.match(line):
                own.append(_instruction(match["name"], match["rest"]))
        self._by_kernel = {_kernel_name(x.name): x for x in self}

    def __iter__(self) -> Iterator[Instruction]:
        """All instructions."""
        for own in self._computations.values():
            yield from own

    def find(self, name: str) -> Instruction | None:
        """The instruction of a name, or the one that a kernel is named after."""
        name = _kernel_name(name)
        return self._by_kernel.get(name) or self._by_kernel.get(re.sub(r"_\d+$", "", name))

    def inner(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations that an instruction runs."""
        for callee in instruction.callees:
            yield from self._computations.get(callee, ())

    def custom_calls(self) -> Iterator[Instruction]:
        """The custom calls in the order in which they run."""
        return self._custom_calls(self._computations[self._entry])

    def _custom_calls(self, instructions: list[Instruction]) -> Iterator[Instruction]:
        for x in instructions:
            if x.target:
                yield x
            if x.opcode in ("while", "call", "conditional"):
                for _ in range(x.trips):
                    yield from self._custom_calls(list(self.inner(x)))


def _kernel_name(name: str) -> str:
    """The name that XLA gives the kernel of an instruction."""
    return re.sub(r"[.\-]", "_", name)


def _instruction(name: str, rest: str) -> Instruction:
    opcode, trips, branches = _OPCODE.search(rest), _TRIPS.search(rest), _BRANCHES.search(rest)
    callees = _CALLEES.findall(rest) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])
    return Instruction(
        name=name,
        opcode=opcode[1] if opcode else "",
        op_name=_quoted("op_name", rest),
        target=_quoted("custom_call_target", rest),
        callees=tuple(callees),
        trips=int(trips[1]) if trips else 1,
    )


def _quoted(key: str, text: str) -> str:
    match = re.search(f'{key}="([^"]*)"', text)
    return match[1] if match else ""
