"""Reads a prompt from the command line: text, a file of text, or token ids."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

import pydantic

from minikv_jax import files
from minikv_jax.evaluation.task import TokenId, read_text
from minikv_jax.models import chat
from minikv_jax.schemas import validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_sources(group: argparse._MutuallyExclusiveGroup) -> None:
    """Adds the options that give the prompt, one of which is required."""
    group.add_argument("--prompt", metavar="TEXT")
    group.add_argument("--prompt-file", type=pathlib.Path, metavar="FILE", help="a UTF-8 text")
    group.add_argument("--tokens-file", type=pathlib.Path, metavar="FILE", help="a JSON list of token ids")


def add_template(parser: argparse.ArgumentParser) -> None:
    """Adds --no-chat-template."""
    parser.add_argument(
        "--no-chat-template", "--raw", action="store_true", help="give the prompt to the model as it is"
    )


def read(arguments: argparse.Namespace) -> str | list[int]:
    """Reads the prompt, as text or as the token ids of --tokens-file.

    Raises:
      ValueError: an empty prompt or a malformed file.
      OSError: a file that cannot be read.
    """
    if arguments.tokens_file is not None:
        return _read_ids(arguments.tokens_file)
    text = arguments.prompt if arguments.prompt_file is None else read_text(arguments.prompt_file)
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


class _Ids(pydantic.RootModel[list[TokenId]]):
    model_config = pydantic.ConfigDict(strict=True)


def _read_ids(path: pathlib.Path) -> list[int]:
    ids = validate(_Ids, files.read_json_list(path), source=path).root
    if not ids:
        raise ValueError(f"{path} is empty: expected at least one token id")
    return ids


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str | list[int], *, raw: bool) -> list[int]:
    """Token ids of a prompt. Text goes through the tokenizer's chat template, if it has one, unless `raw`."""
    if isinstance(prompt, list):
        return prompt
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: pass token ids with --tokens-file")
    if raw or tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    return chat.first_turn(tokenizer, prompt)
