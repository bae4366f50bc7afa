"""The files of a checkpoint directory, none of which may lie outside it."""

from __future__ import annotations

import os
import pathlib

from minikv_jax import checks

_MOST_BYTES = 255  # of a file name, on every common file system


def member(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file of a checkpoint, there or not.

    Links may only lead to other files of the directory, or to the blobs that a snapshot in the Hugging Face hub's cache
    consists of.

    Raises:
      ValueError: the name, or a link, leaves the directory.
    """
    parts = pathlib.PurePath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"{directory}: file name {checks.shown(name)} is not accepted: it leaves the directory")
    if "\0" in name or any(len(part.encode("utf-8", "replace")) > _MOST_BYTES for part in parts.parts):
        raise ValueError(f"{directory}: {checks.shown(name)} is not a file name")
    path, root = directory / name, directory.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    target = pathlib.Path(os.path.realpath(path))
    if not any(map(target.is_relative_to, roots)):
        raise ValueError(f"{directory}: {checks.shown(name)} is not accepted: it is a link that leaves the directory")
    return path


def check_links(directory: pathlib.Path, patterns: list[str]) -> None:
    """Raises ValueError if a file with a name like one of `patterns` is a link that leaves the directory."""
    for pattern in patterns:
        for path in directory.glob(pattern):
            member(directory, str(path.relative_to(directory)))
