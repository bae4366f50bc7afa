"""Locates a benchmark's files in a local directory or in a data set on the Hugging Face hub.

A downloaded data set becomes a directory in the official formats: archives are unpacked, and Parquet becomes JSON
Lines, which needs pyarrow (`pip install minikv_jax[evaluation]`).
"""

from __future__ import annotations

import json
import pathlib
import shutil
import zipfile
from collections.abc import Sequence
from typing import IO, Any

from minikv_jax import checks, files
from minikv_jax.models import hub, packaged


def locate(source: pathlib.Path, patterns: Sequence[str]) -> pathlib.Path:
    """Returns a benchmark's directory, downloading the hub data set `source` if there is no such directory.

    Args:
      source: a directory, or the name of a data set on the hub (`OWNER/NAME`), which is downloaded once.
      patterns: glob patterns of the files to download.

    Raises:
      FileNotFoundError: `source` is neither a directory nor a possible name, or the data set has no such files.
      ConnectionError: the download failed.
      ValueError: a file cannot be read.
    """
    name = source.as_posix()
    if source.is_dir():
        return source
    if source.exists() or not hub.HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"data {name!r} is neither a directory nor a data set on the hub (OWNER/NAME)")
    listed = ", ".join(patterns)
    snapshot = hub.download(name, patterns, repo_type="dataset", advice=f"a local directory with {listed}")
    directory = packaged.cache_directory() / "datasets" / f"{name.replace('/', '--')}@{snapshot.name[:12]}"
    if not directory.is_dir():
        with files.replacing(directory, patience=-1) as part:
            if not directory.is_dir():  # another process may have made it in the meantime
                part.mkdir()
                _collect(snapshot, part)
                if not any(part.iterdir()):
                    raise FileNotFoundError(f"the data set {name!r} on the hub has none of {listed}: see {snapshot}")
    return directory


def _collect(snapshot: pathlib.Path, directory: pathlib.Path) -> None:
    """Collects the JSON and JSON Lines files of a download in one directory."""
    paths = [path for path in sorted(snapshot.rglob("*")) if path.suffix in (".json", ".jsonl", ".zip", ".parquet")]
    for path in paths:
        if path.suffix == ".zip":
            _unpack(path, directory)
        elif path.suffix == ".parquet":
            _append_rows(path, directory)
        else:
            with path.open("rb") as stream:
                _copy(stream, directory / path.name)


def _copy(stream: IO[bytes], path: pathlib.Path) -> None:
    if path.exists():
        raise ValueError(f"the data set has two files of the name {path.name}: expected one")
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file)


def _unpack(path: pathlib.Path, directory: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith((".json", ".jsonl")):
                    with archive.open(member) as packed:
                        _copy(packed, directory / pathlib.PurePath(member).name)
    except files.DAMAGED_ZIP as error:
        raise ValueError(f"{path} is not a zip archive: {checks.reason(error)}") from error


def parquet_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of a Parquet file. Raises ValueError if pyarrow is missing or the file is damaged."""
    try:
        from pyarrow import ArrowException, parquet  # optional
    except ImportError as error:
        raise ValueError(f"{path} is Parquet, which needs pyarrow: pip install minikv_jax[evaluation]") from error
    try:
        return parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file of texts and numbers: {checks.reason(error)}") from error


def _append_rows(path: pathlib.Path, directory: pathlib.Path) -> None:
    """Appends the rows of a Parquet file (`test-00000-of-00001.parquet`) to a JSON Lines file (`test.jsonl`)."""
    try:
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in parquet_rows(path)]
    except TypeError as error:
        raise ValueError(f"{path} is not a Parquet file of texts and numbers: {checks.reason(error)}") from error
    with (directory / f"{path.name.split('-')[0].removesuffix('.parquet')}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(lines)
