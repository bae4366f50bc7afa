"""`gsm8k`: grade-school mathematics (Cobbe et al. 2021, arXiv 2110.14168) with worked examples in the prompt."""

from __future__ import annotations

import dataclasses
import decimal
import pathlib
import re
from typing import TYPE_CHECKING, Any, ClassVar

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import (
    Case,
    encode_pair,
    need_fields,
    need_files,
    need_tokenizer,
    option,
    read_jsonl,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "they come from the grade-school-math repository (grade_school_math/data)"


@dataclasses.dataclass(frozen=True)
class GSM8K:
    """The first rows of train.jsonl are the examples. `score` is 1 if the number after the steps is right.

    `nll` and `kl_to_full` are those of the reference solution, without its calculator annotations.
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

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        examples = [self._pair("train.jsonl", *row) for row in read_jsonl(self.data / "train.jsonl", self.shots or 1)]
        if len(examples) < self.shots:
            raise ValueError(f"{self.data / 'train.jsonl'} has {len(examples)} rows: shots={self.shots}")
        shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples[: self.shots])
        tokenizer = need_tokenizer(tokenizer)
        cases = []
        for number, row in read_jsonl(self.data / "test.jsonl", self.limit):
            question, answer = self._pair("test.jsonl", number, row)
            prompt, continuation = encode_pair(
                tokenizer, f"{shown}Question: {question}\nAnswer:", f" {answer}", chat=self.chat_template
            )
            references = (_final_number(answer) or "",)
            continuation = continuation[: self.max_new_tokens]
            cases.append(Case(f"line {number}", prompt, continuation, references, self.max_new_tokens))
        return cases

    def score(self, case: Case, text: str) -> float:
        return float(_final_number(text.split("Question:")[0]) == case.answers[0])

    def _pair(self, file: str, number: int, row: dict[str, Any]) -> tuple[str, str]:
        where = f"{self.data / file}, line {number}"
        need_fields(where, row, ("question", "answer"))
        if "####" not in row["answer"]:
            raise ValueError(f"{where}: answer has no '#### NUMBER'")
        return row["question"], re.sub(r"<<.*?>>", "", row["answer"])


def _final_number(text: str) -> str | None:
    """The number after "####", or else the last number, without separators and trailing zeros; None without numbers."""
    stated = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    numbers = [stated.group(1)] if stated else re.findall(r"-?[\d,]*\.?\d+", text)
    if not numbers:
        return None
    number = decimal.Decimal(numbers[-1].replace(",", "")).normalize() + 0  # -0 becomes 0
    return f"{number:f}"
