"""A prompt from the command line: text, a file of text, or token ids. No JAX here: `minikv --help` reads this."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from minikv_jax.evaluation.task import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_sources(group: argparse._MutuallyExclusiveGroup) -> None:
    """The arguments that give the prompt, one of which is used."""
    group.add_argument("--prompt", metavar="TEXT")
    group.add_argument("--prompt-file", type=pathlib.Path, metavar="FILE", help="a UTF-8 text")
    group.add_argument("--tokens-file", type=pathlib.Path, metavar="FILE", help="a JSON list of token ids")


def add_template(parser: argparse.ArgumentParser) -> None:
    """The argument that leaves the chat template out."""
    parser.add_argument(
        "--no-chat-template", "--raw", action="store_true", help="give the prompt to the model as it is"
    )


def read(arguments: argparse.Namespace) -> str | list[int]:
    """The prompt as text, or as the token ids of a --tokens-file. Raises ValueError or OSError naming what is wrong."""
    if arguments.tokens_file is not None:
        try:
            ids = json.loads(arguments.tokens_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{arguments.tokens_file} is not valid JSON: {error}") from error
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError(f"{arguments.tokens_file}: expected a JSON list of token ids")
        if not ids:
            raise ValueError(f"{arguments.tokens_file} is empty: expected at least one token id")
        return ids
    if arguments.prompt_file is None:
        text = arguments.prompt
    else:
        text = read_text(arguments.prompt_file)
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str | list[int], *, raw: bool) -> list[int]:
    """Its token ids: text goes through the chat template, where there is one, unless it is to stay `raw`."""
    if isinstance(prompt, list):
        return prompt
    from minikv_jax.models import chat

    if tokenizer is None:
        raise ValueError("the model has no tokenizer: pass token ids with --tokens-file")
    if raw or tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    return chat.first_turn(tokenizer, prompt)
