"""Reads and writes text and JSON files: errors name the file and the line, and a write is all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock

from minikv_jax import checks

# Raised by zipfile for an archive that is cut short, damaged, encrypted, or compressed in an unknown way.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
_PATIENCE_SECONDS = 10.0  # writing a file takes far less


# Reading --------------------------------------------------------------------------------------------------------------


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file. Raises OSError, or ValueError naming a file that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not valid JSON, or not an object; the text names the file.
    """
    value = _parsed(str(path), read_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json_list(path: pathlib.Path) -> list[Any]:
    """Reads a file that holds a JSON list. Raises the errors of `read_json`."""
    value = _parsed(str(path), read_text(path))
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected a list")
    return value


def read_jsonl(path: pathlib.Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a JSON Lines file line by line: yields line numbers and objects, skipping blank lines.

    Args:
      path: the file.
      limit: objects to read; all by default.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not a JSON object, or the file has no lines; the text names the file and the line.
    """
    count = 0
    with path.open("rb") as stream:  # only "\n" ends a line: a string may contain Unicode's line separators
        for number, line in enumerate(stream, 1):
            if count == limit:
                return
            if line.strip():
                count += 1
                yield number, _parsed_line(f"{path}, line {number}", line)
    if not count:
        raise ValueError(f"{path} is empty: expected one JSON object per line")


def read_log(path: pathlib.Path) -> tuple[list[tuple[int, dict[str, Any]]], bytes]:
    """Reads a file of `appending`: line numbers and objects, and the torn last line that a killed process left."""
    *lines, torn = path.read_bytes().split(b"\n")
    return [(number, _parsed_line(f"{path}, line {number}", line)) for number, line in enumerate(lines, 1)], torn


def sha256(path: pathlib.Path) -> str:
    """Computes the SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parsed_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = _parsed(where, line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got a {type(row).__name__}")
    return row


def _parsed(source: str, text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(f"{source}: {half!r} is half a character, which no text may hold") from error
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {checks.shown(twice)} is there twice")
    return values


# Writing --------------------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any], indent: int = 1) -> None:
    """Writes a JSON file, all or nothing. Raises ValueError for NaN or infinity, which JSON cannot hold."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file, all or nothing."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, all or nothing: whatever happens, `path` holds either `content` or its previous content.

    Devices, pipes and this process's own output cannot be replaced: `content` is appended to them.

    Raises:
      OSError: the file cannot be written; the error names `path`.
    """
    if not _is_replaceable(pathlib.Path(path)):
        with open(path, "ab") as stream:  # follows what was printed
            stream.write(content)
        return
    with replacing(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], patience: float = _PATIENCE_SECONDS, *, new: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a scratch path. What the block makes there, a file or directory, replaces `path` in one step at its end.

    If the block makes nothing, raises or is killed, `path` stays as it is. Leftovers of a killed process are removed
    when `path` is written again. A directory cannot replace one that is not empty.

    Args:
      path: the file or directory to write.
      patience: seconds to wait for another process that writes `path`; -1 waits as long as it takes.
      new: whether `path` must not exist.

    Raises:
      FileExistsError: `new`, and `path` exists.
      BlockingIOError: another process is writing `path`.
      OSError: the disk is full, for instance; the error names `path`.
    """
    target = pathlib.Path(path).resolve()  # a link stays a link
    scratch = _beside(target, "partial")
    with _naming(target), locked(target, patience):
        if new and target.exists():
            raise FileExistsError(f"{target} exists: give a new path")
        _remove(scratch)
        try:
            scratch.mkdir()
            part = scratch / target.name
            yield part
            if part.exists():
                if target.is_file():
                    shutil.copymode(target, part)
                _sync(part)
                os.replace(part, target)
                _sync_one(target.parent)
        finally:
            _remove(scratch)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], patience: float = 0.0, *, file: pathlib.Path | None = None) -> Iterator[None]:
    """Lets one process at a time into the block.

    Args:
      path: the file or directory that the block writes; errors name it.
      patience: seconds to wait for other processes; -1 waits as long as it takes.
      file: the lock file, by default one beside `path`. Missing parent directories are made.

    Raises:
      BlockingIOError: another process is still in its block.
    """
    file = _beside(pathlib.Path(path), "lock") if file is None else file
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout as error:
        raise BlockingIOError(f"{os.fspath(path)} is being written by another process: wait until it ends") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # still held: a waiting process sees that it is gone, and makes another
        lock.release()


@contextlib.contextmanager
def appending(path: pathlib.Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that appends a JSON object as a line. The line is on disk when the function returns.

    If a line cannot be written, nothing of it stays in the file. A killed process may leave a torn last line, which
    `read_log` returns separately.
    """
    with path.open("ab", buffering=0) as stream:

        def append(row: Mapping[str, Any]) -> None:
            line = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
            size = os.fstat(stream.fileno()).st_size
            try:
                with _naming(path):
                    while line:
                        line = line[stream.write(line) :]
                    os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(size)
                raise

        yield append


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Makes errors of the operating system name `path` instead of the scratch file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_replaceable(path: pathlib.Path) -> bool:
    """Whether a file can replace `path`: it is no device, no pipe and not this process's own output."""
    if not path.exists():
        return True
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return False
    return path.is_file()


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """Returns a hidden path beside `path`, with a name of limited length."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{suffix}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # files that are still being written are removed next time
    else:
        path.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or a directory with everything in it, is on disk."""
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync_one(each)


def _sync_one(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
