"""Defines tasks: their options, their cases, and the score of generated text.

A task is a frozen dataclass whose fields, made with `option`, are its options and the command's arguments. It makes
`Case`s for a tokenizer. A case with a `continuation` measures fidelity. A case with `max_new_tokens` is also answered
by greedy generation, and the task scores the text.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar

import pydantic

from minikv_jax import files, schemas
from minikv_jax.checks import read_integer, read_number, shown
from minikv_jax.files import read_text as read_text
from minikv_jax.models.chat import first_turn, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", bound=schemas.Schema)
Text = Annotated[str, pydantic.Field(min_length=1)]
TokenId = Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt and its known continuation or answers.

    Attributes:
      name: a name that is unique within a run.
      prompt: token ids, which methods compress.
      continuation: token ids of the true continuation; empty if unknown.
      answers: references for `Task.score`.
      max_new_tokens: number of tokens to generate; 0 if no text is scored.
      stop: token ids that end the answer, in addition to the model's own.
      group: the group of the case, such as a data set's name. Means are also given per group.
      tags: JSON values to record, such as a depth or a length.
      question: token ids after the prompt, which methods have not seen when they compress it. Cases of one prompt with
        different questions share its compression.
    """

    name: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    stop: tuple[int, ...] = ()
    group: str = ""
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    question: tuple[int, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Number of tokens after the prompt that the cache needs room for."""
        return len(self.question) + max(len(self.continuation), self.max_new_tokens)


class Task(Protocol):
    """Protocol of a benchmark, implemented by frozen dataclasses, one file each in `evaluation/tasks`.

    Options are checked when a task is made, before a model is loaded. Data are checked by `cases`.

    Attributes:
      name: the command's name.
      summary: one line of help.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        """Makes the cases for a model, the same ones every time.

        Args:
          tokenizer: the model's tokenizer, if any.
          positions: the model's longest context, in tokens.

        Raises:
          ValueError: malformed data (the message names the file and line), no tokenizer, or too few positions.
        """
        ...

    def score(self, case: Case, text: str) -> float | None:
        """Scores the text generated for `case`, from 0 to 1; None if the task generates no text."""
        ...


def option(
    help: str, default: Any = dataclasses.MISSING, *, parse: Callable[[str], Any] = str, hub: Sequence[str] = ()
) -> Any:
    """Makes a dataclass field that is also a command-line option.

    Args:
      help: the option's line of help.
      default: the default; without one, the option is required.
      parse: converts the command line's text to the value.
      hub: files to download (`evaluation.data.locate`) if the option, a directory, is given as the name of a data set
        on the hub.
    """
    parse = _READERS.get(parse, parse)
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "hub": tuple(hub)})


def numbers(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Makes a parser for comma-separated values, as `parse` for `option`."""
    read = _READERS.get(parse, parse)

    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(read(part) for part in text.split(","))

    return parse_all


_READERS: dict[Any, Callable[[str], Any]] = {int: read_integer, float: read_number}


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces each `{name}` in `template` by its value, and nothing within the values."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def need_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer. Raises ValueError if the model came without one."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, and this task is made of text: only `cases` takes token ids")
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, reply: str = "") -> list[int]:
    """Encodes a user's message with the chat template, or as plain text if `chat` is off or there is no template.

    Args:
      tokenizer: the model's tokenizer.
      text: the message.
      chat: use the chat template.
      reply: the beginning of the model's answer.

    Returns:
      Token ids.
    """
    if not chat or tokenizer.chat_template is None:
        return list(tokenizer.encode(text + reply))
    return first_turn(tokenizer, text, reply)


_MARK = "<<the user's message>>"


def around(tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> tuple[str, str]:
    """Returns the texts before and after a message: the chat template's, or the first token and a new line."""
    if not chat or tokenizer.chat_template is None:
        return str(tokenizer.bos_token or ""), "\n"
    before, mark, after = render(tokenizer, [{"role": "user", "content": _MARK}]).partition(_MARK)
    if not mark:
        raise ValueError("the chat template drops or changes the user's message")
    return before, after


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, text: str, continuation: str, *, chat: bool, reply: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Encodes a prompt (`encode_prompt`) and its continuation, without tokens that span both.

    The prompt is the one that generation would get. A continuation that opens a chat's reply loses a leading space.

    Returns:
      Token ids of the prompt and of the continuation.
    """
    if chat and tokenizer.chat_template is not None and not reply:
        continuation = continuation.removeprefix(" ")
    prompt = encode_prompt(tokenizer, text, chat=chat, reply=reply)
    joined = encode_prompt(tokenizer, text, chat=chat, reply=reply + continuation)
    if joined[: len(prompt)] == prompt:
        return tuple(prompt), tuple(joined[len(prompt) :])
    return tuple(prompt), tuple(tokenizer.encode(continuation, add_special_tokens=False))


def truncate_middle(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int | None, room: int, *, chat: bool
) -> str:
    """Cuts the middle out of `text` so that the prompt (`encode_prompt`) fits, as LongBench does (pred.py).

    Both ends stay, because they hold the instructions and the question.

    Args:
      tokenizer: the model's tokenizer.
      text: the message.
      context: maximum number of prompt tokens; None for `room`.
      room: tokens that the model's positions leave for the prompt.
      chat: use the chat template.

    Raises:
      ValueError: not even one token of each end fits, or `context` exceeds `room`.
    """
    if context is not None and context > room:
        raise ValueError(f"context={context}: beside the answer the model's positions leave room for {room} tokens")
    limit = room if context is None else context
    excess = len(encode_prompt(tokenizer, text, chat=chat)) - limit
    if excess <= 0:
        return text
    ids = tokenizer.encode(text, add_special_tokens=False)
    keep = len(ids) - excess
    while keep >= 2:
        ends = ids[: keep // 2], ids[len(ids) - (keep - keep // 2) :]
        shorter = "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in ends)
        excess = len(encode_prompt(tokenizer, shorter, chat=chat)) - limit  # the two ends may join to other tokens
        if excess <= 0:
            return shorter
        keep -= excess
    raise ValueError(f"{limit} prompt tokens leave no room for the text within the chat template")


def read_rows(path: pathlib.Path, schema: type[Row], limit: int | None = None) -> Iterator[tuple[str, Row]]:
    """Reads the first `limit` rows of a JSON Lines file, each with its file and line for error messages.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not JSON or does not fit the schema. The message names the file, the line and the key.
    """
    for number, row in files.read_jsonl(path, limit):
        where = f"{path}, line {number}"
        yield where, schemas.validate(schema, row, source=where)


def read_templates(path: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Reads a benchmark's prompts by data set. Raises ValueError if one of `names` lacks a prompt with `{context}`."""
    templates = schemas.validate(_Templates, files.read_json(path), source=path).root
    if missing := [name for name in names if name not in templates]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name in names:
        if "{context}" not in templates[name]:
            raise ValueError(f"{path}: {name} is {shown(templates[name])}; accepted: a text with {{context}}")
    return templates


class _Templates(pydantic.RootModel[dict[str, str]]):
    model_config = pydantic.ConfigDict(strict=True)


def need_file(path: pathlib.Path) -> None:
    """Raises FileNotFoundError if `path` is not a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")


def need_files(directory: pathlib.Path, names: Sequence[str], source: str) -> None:
    """Raises FileNotFoundError naming the files that `directory` lacks, and their source."""
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}: {source}")
