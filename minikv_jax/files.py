"""Text, JSON and arrays on disk, with errors that name the file and the line."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

_ARRAYS = "arrays"


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file. Raises OSError, or ValueError naming a file that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not valid JSON, or not an object, naming the file.
    """
    value = _parse(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json_list(path: pathlib.Path) -> list[Any]:
    """Reads the JSON list in a file. Raises as `read_json` does."""
    value = _parse(path)
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected a list")
    return value


def read_jsonl(path: pathlib.Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Reads a JSON Lines file: line number and object of the first `limit` lines that are not blank.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not a JSON object, or the file has no lines, naming the file and the line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got a {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} is empty: expected one JSON object per line")
    return rows


def _parse(path: pathlib.Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def save_arrays(
    directory: str | os.PathLike[str], arrays: Any, description: Mapping[str, Any], *, kind: str
) -> pathlib.Path:
    """Writes a pytree of arrays and its JSON description into a new directory.

    The arrays are an Orbax checkpoint of numbered leaves. The description, `{kind}.json`, is written last: a directory
    that has one is complete.

    Args:
      directory: must not exist; its parents are made.
      arrays: any pytree; only its leaves are stored.
      description: what a reader needs to rebuild the structure, as JSON values.
      kind: what the directory holds, in a word that also stands in errors: "cache", "calibration".

    Returns:
      The directory as an absolute path.

    Raises:
      FileExistsError: there is something at `directory` already.
    """
    path = pathlib.Path(directory).resolve()
    if path.exists():
        raise FileExistsError(f"{path} exists: a {kind} is saved into a new directory")
    path.mkdir(parents=True)
    import orbax.checkpoint as ocp  # not at the top: about a second of every start

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _ARRAYS, _numbered(arrays))
    _description_path(path, kind).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return path


def holds(directory: str | os.PathLike[str], kind: str) -> bool:
    """Whether `save_arrays` wrote `directory`, with this kind."""
    return _description_path(directory, kind).is_file()


def read_description(directory: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Reads the description that `save_arrays` wrote.

    Raises:
      FileNotFoundError: `directory` holds no arrays of this kind.
      ValueError: the description is damaged.
    """
    if not holds(directory, kind):
        name = _description_path(directory, kind).name
        raise FileNotFoundError(f"{os.fspath(directory)} holds no saved {kind}: {name} is missing")
    return read_json(_description_path(directory, kind))


def load_arrays(directory: str | os.PathLike[str], like: Any) -> Any:
    """Reads the arrays that `save_arrays` wrote.

    Args:
      directory: as given to `save_arrays`.
      like: a pytree of the stored structure, shapes and dtypes. A leaf is a `jax.ShapeDtypeStruct` or a JAX array for a
        JAX array, and a NumPy array for a NumPy array.

    Raises:
      FileNotFoundError: the arrays are missing.
      ValueError: they are damaged, or differ from `like` in number, shape or dtype, naming each that differs.
    """
    import jax  # not at the top: text and JSON are read without it
    import orbax.checkpoint as ocp  # not at the top: about a second of every start

    path = pathlib.Path(directory).resolve() / _ARRAYS
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: the saved arrays are missing")
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
    """Turns what Orbax raises for damaged files into one ValueError that names the path."""
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete {kind}: {error}") from error


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
    import jax  # not at the top: text and JSON are read without it

    return {f"{number:05d}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


def _description_path(directory: str | os.PathLike[str], kind: str) -> pathlib.Path:
    return pathlib.Path(directory) / f"{kind}.json"
