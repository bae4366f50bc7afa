"""`gsm8k`: grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168) with worked examples in the prompt."""

from __future__ import annotations

import dataclasses
import decimal
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import (
    Case,
    Text,
    encode_pair,
    need_files,
    need_tokenizer,
    option,
    read_rows,
)
from minikv_jax.schemas import Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "they come from the grade-school-math repository (grade_school_math/data)"


_STATED = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def _states_a_number(answer: str) -> str:
    if not _STATED.search(answer):
        raise ValueError("text with '#### NUMBER'")
    return answer


class _Row(Schema, extra="ignore"):
    question: Text
    answer: Annotated[str, AfterValidator(_states_a_number)]


@dataclasses.dataclass(frozen=True)
class GSM8K:
    """Grade-school mathematics with worked examples, the first rows of train.jsonl.

    `score` is 1 if the final number is right. `nll` and `kl_to_full` are those of the reference solution without its
    calculator annotations.
    """

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "grade-school mathematics, from a directory with test.jsonl and train.jsonl"

    data: pathlib.Path = option(
        "a directory with test.jsonl and train.jsonl, or a data set on the hub (openai/gsm8k)",
        parse=pathlib.Path,
        hub=("main/*.parquet", "test.jsonl", "train.jsonl"),
    )
    shots: int = option("worked examples in the prompt", 8, parse=int)
    max_new_tokens: int = option("tokens of an answer at most", 256, parse=int)
    limit: int | None = option("take the first N questions", None, parse=int)
    chat_template: bool = option("put the prompt into the model's chat template", True, parse=bool)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, max_new_tokens=self.max_new_tokens)
        at_least(0, shots=self.shots)
        need_files(self.data, ["test.jsonl", "train.jsonl"], SOURCE)
        self._pairs()  # report a wrong row before the model is loaded

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        examples, pairs = self._pairs()
        shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for _, question, answer in examples)
        tokenizer = need_tokenizer(tokenizer)
        cases = []
        for where, question, answer in pairs:
            prompt, continuation = encode_pair(
                tokenizer, f"{shown}Question: {question}\nAnswer:", f" {answer}", chat=self.chat_template
            )
            references = (_final_number(answer) or "",)
            continuation = continuation[: self.max_new_tokens]
            cases.append(Case(where, prompt, continuation, references, self.max_new_tokens))
        return cases

    def score(self, case: Case, text: str) -> float:
        return float(_final_number(text.split("Question:")[0]) == case.answers[0])

    def _pairs(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
        """Reads the examples and the questions, each as line, question and answer."""
        examples = list(_read(self.data / "train.jsonl", self.shots)) if self.shots else []
        if len(examples) < self.shots:
            raise ValueError(f"{self.data / 'train.jsonl'} has {len(examples)} rows: shots={self.shots}")
        return examples, list(_read(self.data / "test.jsonl", self.limit))


def _read(path: pathlib.Path, limit: int | None) -> Iterator[tuple[str, str, str]]:
    """Reads lines, questions and answers, without calculator annotations."""
    for where, row in read_rows(path, _Row, limit):
        yield where.removeprefix(f"{path}, "), row.question, re.sub(r"<<.*?>>", "", row.answer)


def _final_number(text: str) -> str | None:
    """Finds the number after "####", or else the last number, without separators and trailing zeros."""
    stated = _STATED.search(text)
    numbers = [stated.group(1)] if stated else re.findall(r"-?[\d,]*\.?\d+", text)
    if not numbers:
        return None
    number = decimal.Decimal(numbers[-1].replace(",", "")).normalize() + 0  # -0 becomes 0
    return f"{number:f}"
