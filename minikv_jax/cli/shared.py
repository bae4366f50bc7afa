"""What the command lines share: a parser whose errors are one line, and values that are checked as they are read."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"minikv: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def key_value(text: str) -> tuple[str, str]:
    """`KEY=VALUE` as a pair."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return key, value


def output_file(text: str) -> pathlib.Path:
    """A file to be written when the work is done: its directory is there already."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a directory that exists")
    return path


def output_directory(text: str) -> pathlib.Path:
    """A directory to be written to, new or not."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a directory, this is a file")
    return path


def seed(text: str) -> int:
    """A seed of `jax.random.key`."""
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer") from error
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of 64 bits")
    return value
