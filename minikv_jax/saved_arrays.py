"""Saves a pytree of arrays in a directory (Orbax) with a JSON description and the SHA-256 of every file."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from minikv_jax import checks, files
from minikv_jax.orbax_errors import naming_damage, naming_failure
from minikv_jax.schemas import Schema, validate

_ARRAYS = "arrays"


class Description(Schema):
    """Common part of the JSON description; each kind of directory adds its own keys.

    Attributes:
      files: SHA-256 of every file of the arrays, by its path within the directory.
    """

    files: dict[str, str]


_Description = TypeVar("_Description", bound=Description)


def save(directory: str | os.PathLike[str], arrays: Any, description: Mapping[str, Any], *, kind: str) -> pathlib.Path:
    """Writes a pytree of arrays and its JSON description into a new directory, all or nothing.

    The arrays are an Orbax checkpoint of numbered leaves. The description is `{kind}.json`.

    Args:
      directory: must not exist; missing parent directories are made.
      arrays: any pytree; only its leaves are stored.
      description: JSON values from which a reader rebuilds the structure.
      kind: a word for the content, used in file names and errors: "cache", "calibration".

    Returns:
      The directory as an absolute path.

    Raises:
      FileExistsError: `directory` exists already.
      BlockingIOError: another process is writing it.
      OSError: it cannot be written, on a full disk for instance. Nothing of it remains.
    """
    import orbax.checkpoint as ocp  # not at the top: about a second of every start

    path = pathlib.Path(directory).resolve()
    with files.replacing(path, patience=0, new=True) as part:
        part.mkdir()
        with naming_failure(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / _ARRAYS, _numbered(arrays))
        names = _names(part)
        sums = dict(zip(names, _sha256s([part / name for name in names]), strict=True))
        files.write_json(_description_path(part, kind), {**description, "files": sums})
    return path


def holds(directory: str | os.PathLike[str], kind: str) -> bool:
    """Whether `directory` holds saved arrays of this kind."""
    return _description_path(directory, kind).is_file()


def read_description(directory: str | os.PathLike[str], kind: str, schema: type[_Description]) -> _Description:
    """Reads the description written by `save`.

    Raises:
      FileNotFoundError: `directory` holds no arrays of this kind.
      ValueError: the description is damaged.
    """
    path = _description_path(directory, kind)
    if not path.is_file():
        raise FileNotFoundError(f"{os.fspath(directory)} holds no saved {kind}: {path.name} is missing")
    return validate(schema, files.read_json(path), source=path)


def load(directory: str | os.PathLike[str], description: Description, like: Any) -> Any:
    """Reads the arrays written by `save`.

    Args:
      directory: the directory written by `save`.
      description: returned by `read_description`.
      like: a pytree of the stored structure, shapes and dtypes. A `jax.ShapeDtypeStruct` or JAX array is read as a JAX
        array, a NumPy array as a NumPy array.

    Raises:
      FileNotFoundError: the arrays are missing.
      ValueError: they are damaged, or differ from `like` in number, shape or dtype; the text names each difference.
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


def _check_files(directory: pathlib.Path, sums: Mapping[str, str]) -> None:
    """Raises ValueError naming the first file that is missing, was not saved, or has changed since."""
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
    """Lists the arrays' files by their paths within the directory."""
    files = (path for path in (directory / _ARRAYS).rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _sha256s(paths: list[pathlib.Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return list(pool.map(files.sha256, paths))


def _check_leaves(path: pathlib.Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError naming every leaf of another shape or dtype than expected."""
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
