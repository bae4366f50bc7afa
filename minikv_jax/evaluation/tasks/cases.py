"""`cases`: a user's own prompts and continuations, as JSON Lines."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any, ClassVar

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import Case, need_file, need_tokenizer, option, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Cases:
    """Each line is `{"prompt_ids": [...], "continuation_ids": [...]}` or `{"prompt": "...", "continuation": "..."}`.

    Text is given to the model as it is, without a chat template. A prompt begins with the tokenizer's first token (BOS)
    if it has one.
    """

    name: ClassVar[str] = "cases"
    summary: ClassVar[str] = "prompts with known continuations, from a JSON Lines file"

    data: pathlib.Path = option("a JSON Lines file (docs/evaluation.md)", parse=pathlib.Path)
    limit: int | None = option("take the first N cases", None, parse=int)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit)
        need_file(self.data)

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        cases = []
        for number, row in read_jsonl(self.data, self.limit):
            where = f"{self.data}, line {number}"
            prompt, continuation = _token_ids(where, row, tokenizer)
            if len(prompt) + len(continuation) > positions:
                raise ValueError(
                    f"{where}: {len(prompt)} prompt + {len(continuation)} continuation tokens exceed the model's "
                    f"{positions} positions"
                )
            cases.append(Case(f"line {number}", prompt, continuation))
        return cases

    def score(self, case: Case, text: str) -> None:
        del case, text


def _token_ids(
    where: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if {"prompt_ids", "continuation_ids"} <= row.keys():
        parts = {name: row[name] for name in ("prompt_ids", "continuation_ids")}
        for name, ids in parts.items():
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise ValueError(f"{where}: {name} is not a list of token ids")
    elif {"prompt", "continuation"} <= row.keys():
        parts = {name: row[name] for name in ("prompt", "continuation")}
        for name, text in parts.items():
            if not isinstance(text, str):
                raise ValueError(f"{where}: {name} is a {type(text).__name__}, not a text")
            parts[name] = need_tokenizer(tokenizer).encode(text, add_special_tokens=name == "prompt")
    else:
        raise ValueError(
            f"{where} has {', '.join(row) or 'no fields'}: expected prompt_ids and continuation_ids, or prompt and "
            "continuation"
        )
    for name, ids in parts.items():
        if not ids:
            raise ValueError(f"{where}: {name} is empty")
    prompt, continuation = parts.values()
    return tuple(prompt), tuple(continuation)
