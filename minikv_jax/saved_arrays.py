"""A pytree of arrays in a directory (Orbax), and the JSON file that describes it and holds its files' SHA-256."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from minikv_jax import checks, files
from minikv_jax.schemas import Schema, validate

_ARRAYS = "arrays"


class Description(Schema):
    """What the JSON file holds beside what a kind of directory adds.

    Attributes:
      files: SHA-256 of every file of the arrays, by its path within the directory.
    """

    files: dict[str, str]


_Description = TypeVar("_Description", bound=Description)


def save(directory: str | os.PathLike[str], arrays: Any, description: Mapping[str, Any], *, kind: str) -> pathlib.Path:
    """Writes a pytree of arrays and its JSON description into a new directory, which appears when it is complete.

    The arrays are an Orbax checkpoint of numbered leaves. The description is `{kind}.json`.

    Args:
      directory: must not exist; its parents are made.
      arrays: any pytree; only its leaves are stored.
      description: what a reader needs to rebuild the structure, as JSON values.
      kind: what the directory holds, in a word that also stands in errors: "cache", "calibration".

    Returns:
      The directory as an absolute path.

    Raises:
      FileExistsError: there is something at `directory` already.
      BlockingIOError: another process is writing it.
      OSError: it cannot be written, on a full disk for instance. Nothing is left of it then.
    """
    import orbax.checkpoint as ocp  # not at the top: about a second of every start

    path = pathlib.Path(directory).resolve()
    with files.replacing(path, patience=0, new=True) as part:
        part.mkdir()
        with orbax_errors(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / _ARRAYS, _numbered(arrays))
        names = _names(part)
        sums = dict(zip(names, _sha256s([part / name for name in names]), strict=True))
        files.write_json(_description_path(part, kind), {**description, "files": sums})
    return path


def holds(directory: str | os.PathLike[str], kind: str) -> bool:
    """Whether `save` wrote `directory`, with this kind."""
    return _description_path(directory, kind).is_file()


def read_description(directory: str | os.PathLike[str], kind: str, schema: type[_Description]) -> _Description:
    """Reads the description that `save` wrote.

    Raises:
      FileNotFoundError: `directory` holds no arrays of this kind.
      ValueError: the description is damaged.
    """
    path = _description_path(directory, kind)
    if not path.is_file():
        raise FileNotFoundError(f"{os.fspath(directory)} holds no saved {kind}: {path.name} is missing")
    return validate(schema, files.read_json(path), source=path)


def load(directory: str | os.PathLike[str], description: Description, like: Any) -> Any:
    """Reads the arrays that `save` wrote.

    Args:
      directory: as given to `save`.
      description: of `read_description`.
      like: a pytree of the stored structure, shapes and dtypes. A leaf is a `jax.ShapeDtypeStruct` or a JAX array for a
        JAX array, and a NumPy array for a NumPy array.

    Raises:
      FileNotFoundError: the arrays are missing.
      ValueError: they are damaged, or differ from `like` in number, shape or dtype, naming each that differs.
    """
    import jax  # not at the top: descriptions are read without it
    import orbax.checkpoint as ocp  # not at the top: about a second of every start

    path = pathlib.Path(directory).resolve() / _ARRAYS
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: the saved arrays are missing")
    _check_files(path.parent, description.files)
    leaves = _numbered(like)
    with ocp.StandardCheckpointer() as checkpointer:
        with naming_damage(path, "Orbax checkpoint"):
            stored = checkpointer.metadata(path).item_metadata.tree
        _check_leaves(path, stored, leaves)  # Orbax would pad or cut a NumPy array of another shape
        with naming_damage(path, "Orbax checkpoint"):
            restored = checkpointer.restore(path, leaves)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])


@contextlib.contextmanager
def naming_damage(path: pathlib.Path, kind: str) -> Iterator[None]:
    """Turns what Orbax raises for damaged files into one ValueError that names the path, in one line."""
    before = sys.unraisablehook
    if not isinstance(before, _LateReads):
        sys.unraisablehook = _LateReads(before)
    try:
        yield
    except Exception as error:  # Orbax raises bare ones; what TensorStore said is their cause
        _drop_late_reports()
        raise ValueError(f"{path} is not a complete {kind}: {checks.reason(error.__cause__ or error)}") from None
    sys.unraisablehook = before  # after a failure it stays: reads may still be under way


# Orbax reads all arrays at once, and leaves the loop that the reads report to at the first failure. The others then say
# on stderr what became of them, in up to forty lines each: as unraisable exceptions, log records and warnings.
_LATE = re.compile("Event loop is closed|Encountered error while reading array|coroutine '_read_array|tensorstore_spec")


class _LateReads:
    """Drops the reports of reads that end after another one has failed, and gives others to the hook before it."""

    def __init__(self, before: Callable[[sys.UnraisableHookArgs], Any]):
        self._before = before

    def __call__(self, report: sys.UnraisableHookArgs) -> None:
        if not _LATE.search(str(report.exc_value)):
            self._before(report)


def _drop_late_reports() -> None:
    warnings.filterwarnings("ignore", "coroutine '_read_array", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_is_no_late_report)


def _is_no_late_report(record: logging.LogRecord) -> bool:
    return not _LATE.search(record.getMessage())


@contextlib.contextmanager
def orbax_errors() -> Iterator[None]:
    """Turns what Orbax raises for files that it cannot write into an OSError of one line, which `replacing` names."""
    try:
        yield
    except Exception as error:  # TensorStore's are of several kinds
        raise OSError(errno.EIO, checks.reason(error)) from None


def _check_files(directory: pathlib.Path, sums: Mapping[str, str]) -> None:
    """Raises ValueError naming the first file that is missing, was not saved, or is not as it was saved."""
    there = _names(directory)
    if missing := [name for name in sums if name not in there]:
        raise ValueError(f"{directory}: the file {checks.shown(missing[0])} is missing: the arrays are not complete")
    if more := [name for name in there if name not in sums]:
        raise ValueError(f"{directory}: the file {checks.shown(more[0])} is not one that was saved")
    paths = [directory / name for name in sums]
    for path, expected, now in zip(paths, sums.values(), _sha256s(paths), strict=True):
        if now != expected:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was saved with it")


def _names(directory: pathlib.Path) -> list[str]:
    """The files of the arrays, by their paths within the directory."""
    files = (path for path in (directory / _ARRAYS).rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _sha256s(paths: list[pathlib.Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return list(pool.map(files.sha256, paths))


def _check_leaves(path: pathlib.Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError naming every leaf whose shape or dtype is not the expected one."""
    if stored.keys() != expected.keys():
        raise ValueError(f"{path} holds {len(stored)} arrays, expected {len(expected)}")
    pairs = [(name, _shape(stored[name]), _shape(leaf)) for name, leaf in expected.items()]
    if misfits := [f"{name} is {was}, expected {now}" for name, was, now in pairs if was != now]:
        raise ValueError(f"{path} holds other arrays: {', '.join(misfits)}")


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _numbered(tree: Any) -> dict[str, Any]:
    import jax  # not at the top: descriptions are read without it

    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


def _description_path(directory: str | os.PathLike[str], kind: str) -> pathlib.Path:
    return pathlib.Path(directory) / f"{kind}.json"
