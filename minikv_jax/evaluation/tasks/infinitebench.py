"""`infinitebench`: InfiniteBench (arXiv 2402.13718), from a directory in the official format.

The directory holds `<dataset>.jsonl` with `context`, `input`, `answer` and, for choices, `options`; and `prompts.json`,
the benchmark's templates by data set (src/prompt.py), with `{context}`, `{input}` or `{question}`, `{OPTION_A}` ...
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import (
    Case,
    encode_pair,
    fill,
    need_fields,
    need_files,
    need_tokenizer,
    numbers,
    option,
    read_jsonl,
    truncate_middle,
)
from minikv_jax.evaluation.tasks import metrics

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


@dataclasses.dataclass(frozen=True)
class InfiniteBench:
    """Retrieval, book and dialogue sets. Answers have the official lengths; a prompt that is too long loses its middle.

    The official lengths suit GPT-4's tokenizer, so they may cut numbers that another tokenizer writes in more tokens.
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

    @property
    def _prompts(self) -> pathlib.Path:
        return self.prompts or self.data / _PROMPTS

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        prompts = self._prompts
        templates = json.loads(prompts.read_text(encoding="utf-8"))
        need_fields(str(prompts), templates, self.datasets)
        tokenizer = need_tokenizer(tokenizer)
        positions -= max(DATASETS[name].max_new_tokens for name in self.datasets)
        cases = []
        for name in self.datasets:
            path = self.data / f"{name}.jsonl"
            for number, row in read_jsonl(path, self.limit):
                where = f"{path}, line {number}"
                need_fields(where, row, ("context", "input", "answer"))
                cases.append(self._case(tokenizer, name, where, row, templates[name], positions))
        return cases

    def score(self, case: Case, text: str) -> float:
        return max(DATASETS[case.group].score(text, answer) for answer in case.answers)

    def _case(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        where: str,
        row: Mapping[str, Any],
        template: str,
        room: int,
    ) -> Case:
        max_new_tokens = DATASETS[name].max_new_tokens
        text = _prompt(template, row)
        text = truncate_middle(tokenizer, text, self.context, room, chat=self.chat_template)
        answers = [str(answer) for answer in _listed(row["answer"])]
        if not answers:
            raise ValueError(f"{where}: answer is empty")
        if name == "longbook_choice_eng":
            answers = ["ABCD"[row["options"].index(answer)] for answer in answers]
        ids, continuation = encode_pair(tokenizer, text, f" {answers[0]}", chat=self.chat_template)
        label = f"{name} {row.get('id', where)}"
        return Case(label, ids, continuation[:max_new_tokens], tuple(answers), max_new_tokens, group=name)


def _listed(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def _prompt(template: str, row: Mapping[str, Any]) -> str:
    values = {"context": row["context"], "input": row["input"], "question": row["input"]}
    values |= {f"OPTION_{letter}": text for letter, text in zip("ABCD", row.get("options") or (), strict=False)}
    return fill(template, values)
