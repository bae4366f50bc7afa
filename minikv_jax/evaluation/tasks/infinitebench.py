"""`infinitebench`: InfiniteBench (arXiv 2402.13718), from a directory in the official format.

The directory holds `<dataset>.jsonl` with `context`, `input`, `answer` and, for choices, `options`; and `prompts.json`,
the benchmark's templates by data set (src/prompt.py), with `{context}`, `{input}` or `{question}`, `{OPTION_A}` ...
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import (
    Case,
    Text,
    encode_pair,
    fill,
    need_files,
    need_tokenizer,
    numbers,
    option,
    read_rows,
    read_templates,
    truncate_middle,
)
from minikv_jax.evaluation.tasks import metrics
from minikv_jax.schemas import Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = (
    "the data come from the data set xinrongzhang2022/InfiniteBench, the prompts from the benchmark's src/prompt.py"
)
_PROMPTS = "prompts.json"


class _Dataset(NamedTuple):
    max_new_tokens: int
    score: Callable[[str, str], float]


DATASETS: dict[str, _Dataset] = {
    "passkey": _Dataset(6, metrics.first_number),
    "number_string": _Dataset(12, metrics.first_number),
    "kv_retrieval": _Dataset(50, metrics.has_word),
    "longbook_qa_eng": _Dataset(40, metrics.qa_f1),
    "longbook_sum_eng": _Dataset(1200, metrics.rouge_l),
    "longbook_choice_eng": _Dataset(40, metrics.choice),
    "longdialogue_qa_eng": _Dataset(40, lambda text, name: metrics.has_word(text.upper(), name.upper())),
}


_CHOICE, _LETTERS = "longbook_choice_eng", "ABCD"


class _Row(Schema, extra="ignore"):
    context: Text
    input: str
    answer: str | int | Annotated[list[str | int], Field(min_length=1)]
    options: list[str] | None = None
    id: str | int | None = None

    @property
    def answers(self) -> list[str]:
        return [str(answer) for answer in (self.answer if isinstance(self.answer, list) else [self.answer])]

    def letters(self, where: str) -> list[str]:
        """Letters of the right options. Raises ValueError unless there are four options that include the answers."""
        if not self.options or len(self.options) != len(_LETTERS):
            raise ValueError(f"{where}: options is {self.options!r:.80}; accepted: a list of {len(_LETTERS)} texts")
        for answer in self.answers:
            if answer not in self.options:
                raise ValueError(f"{where}: answer is {answer!r:.80}; accepted: one of the options")
        return [_LETTERS[self.options.index(answer)] for answer in self.answers]


@dataclasses.dataclass(frozen=True)
class InfiniteBench:
    """Retrieval, book and dialogue sets of InfiniteBench. A prompt that is too long loses its middle.

    Answers have the official lengths. These suit GPT-4's tokenizer, and may cut numbers that need more tokens with
    another tokenizer.
    """

    name: ClassVar[str] = "infinitebench"
    summary: ClassVar[str] = "InfiniteBench, from a directory in the official format"

    data: pathlib.Path = option(
        f"a directory with DATASET.jsonl and {_PROMPTS}, or a data set on the hub (xinrongzhang2022/InfiniteBench)",
        parse=pathlib.Path,
        hub=(*(f"{name}.jsonl" for name in DATASETS), _PROMPTS),
    )
    prompts: pathlib.Path | None = option(
        f"the benchmark's templates; default: DATA/{_PROMPTS}", None, parse=pathlib.Path
    )
    datasets: tuple[str, ...] = option("which sets", tuple(DATASETS), parse=numbers(str))
    context: int | None = option("prompt tokens at most; default: what the model can take", None, parse=int)
    limit: int | None = option("take the first N cases of each set", None, parse=int)
    chat_template: bool = option("put the prompt into the model's chat template", True, parse=bool)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, context=self.context)
        for name in self.datasets:
            if name not in DATASETS:
                raise ValueError(f"dataset {name!r}: expected one of {', '.join(DATASETS)}")
        need_files(self._prompts.parent, [self._prompts.name], SOURCE)
        need_files(self.data, [f"{name}.jsonl" for name in self.datasets], SOURCE)
        for _ in self._rows():  # report a wrong row or template before the model is loaded
            pass

    @property
    def _prompts(self) -> pathlib.Path:
        return self.prompts or self.data / _PROMPTS

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        tokenizer = need_tokenizer(tokenizer)
        positions -= max(DATASETS[name].max_new_tokens for name in self.datasets)
        templates = read_templates(self._prompts, self.datasets)
        return [
            self._case(tokenizer, name, where, row, templates[name], positions) for name, where, row in self._rows()
        ]

    def score(self, case: Case, text: str) -> float:
        return max(DATASETS[case.group].score(text, answer) for answer in case.answers)

    def _rows(self) -> Iterator[tuple[str, str, _Row]]:
        """Reads every row with its data set, and its file and line."""
        read_templates(self._prompts, self.datasets)
        for name in self.datasets:
            for where, row in read_rows(self.data / f"{name}.jsonl", _Row, self.limit):
                if name == _CHOICE:
                    row.letters(where)
                yield name, where, row

    def _case(
        self, tokenizer: PreTrainedTokenizerBase, name: str, where: str, row: _Row, template: str, room: int
    ) -> Case:
        max_new_tokens = DATASETS[name].max_new_tokens
        text = truncate_middle(tokenizer, _prompt(template, row), self.context, room, chat=self.chat_template)
        answers = row.letters(where) if name == _CHOICE else row.answers
        ids, continuation = encode_pair(tokenizer, text, f" {answers[0]}", chat=self.chat_template)
        label = f"{name} {where if row.id is None else row.id}"
        return Case(label, ids, continuation[:max_new_tokens], tuple(answers), max_new_tokens, group=name)


def _prompt(template: str, row: _Row) -> str:
    values = {"context": row.context, "input": row.input, "question": row.input}
    values |= {f"OPTION_{letter}": text for letter, text in zip(_LETTERS, row.options or (), strict=False)}
    return fill(template, values)
