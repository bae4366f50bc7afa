"""Reads the tokenizer of a Hugging Face directory with transformers. No code from the directory is run."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, Literal

from minikv_jax import checks, schemas
from minikv_jax.files import read_json
from minikv_jax.models.directory import check_links, member

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja"]


class _Template(schemas.Schema, extra="ignore"):
    """One of several chat templates."""

    name: str
    template: str


_Token = str | dict[str, Any] | None


class _TokenizerConfig(schemas.Schema, extra="ignore"):
    """Keys of a tokenizer_config.json that are checked here; transformers reads more."""

    tokenizer_class: str | None = None
    auto_map: Any = None
    chat_template: str | list[_Template] | dict[str, str] | None = None
    model_max_length: float | None = None
    padding_side: Literal["left", "right"] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None


def tokenizer_from_hf(directory: pathlib.Path) -> PreTrainedTokenizerBase | None:
    """Reads the tokenizer of a directory; returns None if it has none.

    Raises:
      ValueError: transformers cannot read the files, or only by running code from the directory.
    """
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        return None
    check_links(directory, _PATTERNS)
    path, own_code = member(directory, "tokenizer_config.json"), False
    if path.is_file():
        own_code = schemas.validate(_TokenizerConfig, read_json(path), source=path).auto_map is not None
    from transformers import AutoTokenizer  # imported here, because it imports torch, which takes seconds

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        if own_code:
            raise ValueError(
                f"{path}: auto_map names code of the checkpoint, which is never run; accepted: a tokenizer that is "
                "part of transformers"
            ) from error
        raise ValueError(
            f"{directory} holds a tokenizer that transformers cannot read: {checks.reason(error)}"
        ) from error
