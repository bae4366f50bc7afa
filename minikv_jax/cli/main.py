"""The `minikv` command. Results go to stdout, the rest to stderr; a user's error is one line and exit code 2.

A command is a module of this package whose docstring begins with "`minikv NAME`: SUMMARY." and that defines
`add_arguments(parser)` and `run(arguments)`. Only the module of the command that is run is imported, so that
`minikv --help` answers without JAX.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import logging
import os
import pathlib
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from minikv_jax import __version__

_COMMAND = re.compile(r"`minikv (?P<name>[\w-]+)`: (?P<summary>.+)\.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _interrupts_are_raised():
            return _run(_parser().parse_args(argv, argparse.Namespace(command_line=shlex.join(["minikv", *argv]))))
    except KeyboardInterrupt:
        print("minikv: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _interrupts_are_raised() -> Iterator[None]:
    """Raises Ctrl-C again if it came within the garbage collector or a destructor, where Python drops it."""
    before, main_thread = sys.unraisablehook, threading.main_thread().ident
    assert main_thread is not None

    def hook(report: sys.UnraisableHookArgs) -> None:
        if isinstance(report.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, signal.pthread_kill, [main_thread, signal.SIGINT]).start()  # wakes it if it waits
        else:
            before(report)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command, and turns a user's error into its line."""
    try:
        with _log_on_stderr() if arguments.verbose else contextlib.nullcontext():
            code = arguments.run(arguments)
            sys.stdout.flush()  # a full disk shows here, and not after the exit code
            return code
    except (ValueError, NotImplementedError, OSError) as error:
        _drop_output()
        if arguments.verbose:
            raise
        from minikv_jax.checks import printable  # not at the top: it imports NumPy, and --help needs none

        print(f"minikv: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Discards output that cannot be written; otherwise Python would try again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Reports usage errors in one line, and can add its arguments on first use.

    Args:
      fill: adds the arguments.
    """

    def __init__(self, *arguments: Any, fill: Callable[[Parser], None] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self._fill = fill

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As `argparse` does, with the arguments filled in."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"minikv: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class Command(NamedTuple):
    """A command: its name, its line of help, and the module that defines it."""

    name: str
    summary: str
    module: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Imports the module and adds its arguments."""
        module = importlib.import_module(self.module)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)


def commands() -> Iterator[Command]:
    """Reads the commands from the docstrings in this package's files, without importing them."""
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
        if match := _COMMAND.match(docstring):
            yield Command(match["name"], match["summary"], f"minikv_jax.cli.{file.stem}")


def _parser() -> Parser:
    parser = Parser(prog="minikv", description="Text generation with a compressed KV cache.")
    parser.add_argument("--version", action="version", version=f"minikv {__version__}")
    parser.set_defaults(verbose=False)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands():
        subparsers.add_parser(command.name, help=command.summary, fill=command.add_arguments)
    return parser


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Sends the library's messages to stderr, each only once, because every layer chooses the same implementations."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    logger, handler = logging.getLogger("minikv_jax"), logging.StreamHandler()
    handler.addFilter(is_new)
    handlers, propagates, level = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
