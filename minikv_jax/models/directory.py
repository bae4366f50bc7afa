"""Finds the files of a checkpoint directory and refuses links and names that lead out of it."""

from __future__ import annotations

import os
import pathlib

from minikv_jax import checks

_MOST_BYTES = 255  # longest file name on common file systems


def member(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a checkpoint's file, whether or not it exists.

    Links may lead only to other files of the directory or, in the cache of the Hugging Face hub, to its blobs.

    Args:
      directory: the checkpoint's directory.
      name: the file's name, relative to `directory`.

    Raises:
      ValueError: the name or a link leaves the directory, or the name is not a file name.
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
    """Raises ValueError if a file matching one of the glob `patterns` is a link that leaves the directory."""
    for pattern in patterns:
        for path in directory.glob(pattern):
            member(directory, str(path.relative_to(directory)))
