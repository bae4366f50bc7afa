"""`cases`: your own prompts and continuations, from a JSON Lines file."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import Case, Text, TokenId, need_file, need_tokenizer, option, read_rows
from minikv_jax.schemas import Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FORMS = (("prompt_ids", "continuation_ids"), ("prompt", "continuation"))


class _Row(Schema):
    prompt_ids: list[TokenId] = Field([], min_length=1)
    continuation_ids: list[TokenId] = Field([], min_length=1)
    prompt: Text = ""
    continuation: Text = ""

    @model_validator(mode="after")
    def _is_of_one_form(self) -> Self:
        if self.model_fields_set not in map(set, _FORMS):
            expected = ", or ".join(map(" and ".join, _FORMS))
            raise ValueError(f"has {', '.join(sorted(self.model_fields_set)) or 'no keys'}: expected {expected}")
        return self


@dataclasses.dataclass(frozen=True)
class Cases:
    """Your own prompts with known continuations.

    Each line is `{"prompt_ids": [...], "continuation_ids": [...]}` or `{"prompt": "...", "continuation": "..."}`. Text
    is used without a chat template. A prompt begins with the tokenizer's first token (BOS) if it has one.
    """

    name: ClassVar[str] = "cases"
    summary: ClassVar[str] = "prompts with known continuations, from a JSON Lines file"

    data: pathlib.Path = option("a JSON Lines file (docs/evaluation.md)", parse=pathlib.Path)
    limit: int | None = option("take the first N cases", None, parse=int)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit)
        need_file(self.data)
        for _ in read_rows(self.data, _Row, self.limit):  # report a wrong row before the model is loaded
            pass

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        cases = []
        for where, row in read_rows(self.data, _Row, self.limit):
            prompt, continuation = _token_ids(where, row, tokenizer)
            if len(prompt) + len(continuation) > positions:
                raise ValueError(
                    f"{where}: {len(prompt)} prompt + {len(continuation)} continuation tokens exceed the model's "
                    f"{positions} positions"
                )
            cases.append(Case(where.removeprefix(f"{self.data}, "), prompt, continuation))
        return cases

    def score(self, case: Case, text: str) -> None:
        del case, text


def _token_ids(
    where: str, row: _Row, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if row.prompt_ids:
        return tuple(row.prompt_ids), tuple(row.continuation_ids)
    encode = need_tokenizer(tokenizer).encode
    prompt, continuation = encode(row.prompt), encode(row.continuation, add_special_tokens=False)
    for name, ids in (("prompt", prompt), ("continuation", continuation)):
        if not ids:
            raise ValueError(f"{where}: {name} has no tokens")
    return tuple(prompt), tuple(continuation)
