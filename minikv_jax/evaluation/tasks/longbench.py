"""`longbench`: LongBench v1 and LongBench-E (arXiv 2308.14508), from data in the official formats.

The directory holds `<dataset>.jsonl` (`<dataset>_e.jsonl` for E) with the official fields and the benchmark's prompts
in `dataset2prompt.json`, or rows with a complete `prompt` and `answers`. Prompts, answer lengths, scores, and the data
sets without a chat template follow the benchmark's code (pred.py, metrics.py, config/).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

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

SOURCE = "they come from the LongBench repository (config/) and its data set THUDM/LongBench (data.zip)"
_PROMPTS = "dataset2prompt.json"
HUB_FILES = ("data.zip", "*.jsonl", _PROMPTS)  # of the data set on the hub


class _Dataset(NamedTuple):
    max_new_tokens: int
    score: Callable[[str, str], float] | None  # None: classification into the row's classes
    chat_template: bool = True
    first_line: bool = False  # only the answer's first line counts
    stop_at_newline: bool = False


_QA, _ROUGE, _CODE = metrics.qa_f1, metrics.rouge_l, metrics.code_similarity
DATASETS: dict[str, _Dataset] = {
    "narrativeqa": _Dataset(128, _QA),
    "qasper": _Dataset(128, _QA),
    "multifieldqa_en": _Dataset(64, _QA),
    "hotpotqa": _Dataset(32, _QA),
    "2wikimqa": _Dataset(32, _QA),
    "musique": _Dataset(32, _QA),
    "gov_report": _Dataset(512, _ROUGE),
    "qmsum": _Dataset(512, _ROUGE),
    "multi_news": _Dataset(512, _ROUGE),
    "trec": _Dataset(64, None, chat_template=False, first_line=True),
    "triviaqa": _Dataset(32, _QA, chat_template=False, first_line=True),
    "samsum": _Dataset(128, _ROUGE, chat_template=False, first_line=True, stop_at_newline=True),
    "passage_count": _Dataset(32, metrics.share_of_numbers),
    "passage_retrieval_en": _Dataset(32, metrics.paragraph),
    "lcc": _Dataset(64, _CODE, chat_template=False),
    "repobench-p": _Dataset(64, _CODE, chat_template=False),
}


class _Row(Schema, extra="ignore"):
    answers: Annotated[list[str], Field(min_length=1)]
    prompt: Text = ""
    context: Text = ""
    input: str = ""
    all_classes: list[str] | None = None
    official_id: str | int | None = Field(None, alias="_id")
    id: str | int | None = None

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Self:
        missing = sorted({"context", "input"} - self.model_fields_set)
        if missing and not self.prompt:
            raise ValueError(f"lacks {', '.join(missing)}: expected context and input, or prompt")
        return self


@dataclasses.dataclass(frozen=True)
class LongBench:
    """English and code sets of LongBench with the official scores.

    `nll` and `kl_to_full` are those of the first reference. A prompt of more than `context` tokens loses its middle
    before the chat template is applied.
    """

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "LongBench v1 or E, from a directory in the official formats"

    data: pathlib.Path = option(
        f"a directory with DATASET.jsonl and {_PROMPTS}, or a data set on the hub (THUDM/LongBench)",
        parse=pathlib.Path,
        hub=HUB_FILES,
    )
    prompts: pathlib.Path | None = option(
        f"the benchmark's prompts; default: DATA/{_PROMPTS}", None, parse=pathlib.Path
    )
    datasets: tuple[str, ...] | None = option("which sets; default: all whose files exist", None, parse=numbers(str))
    e: bool = option("LongBench-E: DATASET_e.jsonl", False, parse=bool)
    context: int | None = option("prompt tokens at most; default: what the model can take", None, parse=int)
    limit: int | None = option("take the first N cases of each set", None, parse=int)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, context=self.context)
        for _ in self._rows():  # report a wrong row or template before the model is loaded
            pass

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        tokenizer = need_tokenizer(tokenizer)
        positions -= max(DATASETS[dataset].max_new_tokens for dataset in self._datasets())
        return [self._case(tokenizer, *row, positions) for row in self._rows()]

    def score(self, case: Case, text: str) -> float:
        dataset = DATASETS[case.group]
        if dataset.first_line:
            text = text.lstrip("\n").split("\n")[0]
        score = dataset.score or functools.partial(metrics.classification, classes=case.tags["classes"])
        return max(score(text, answer) for answer in case.answers)

    def _file(self, dataset: str) -> str:
        return f"{dataset}_e.jsonl" if self.e else f"{dataset}.jsonl"

    def _datasets(self) -> tuple[str, ...]:
        if self.datasets is None:
            existing = tuple(name for name in DATASETS if (self.data / self._file(name)).is_file())
            if not existing:
                raise FileNotFoundError(f"{self.data} has none of {', '.join(map(self._file, DATASETS))}: {SOURCE}")
            return existing
        for name in self.datasets:
            if name not in DATASETS:
                raise ValueError(f"dataset {name!r}: expected one of {', '.join(DATASETS)} (no Chinese ones)")
        need_files(self.data, [self._file(name) for name in self.datasets], SOURCE)
        return self.datasets

    def _rows(self) -> Iterator[tuple[str, str, _Row, str]]:
        """Reads every row with its data set, its file and line, and its prompt."""
        for dataset in self._datasets():
            template = None
            for where, row in read_rows(self.data / self._file(dataset), _Row, self.limit):
                if DATASETS[dataset].score is None and not row.all_classes:
                    raise ValueError(f"{where}: all_classes is {row.all_classes}; accepted: a list of the classes")
                if not row.prompt:
                    template = template or self._template(dataset)
                prompt = row.prompt or fill(template or "", {"context": row.context, "input": row.input})
                yield dataset, where, row, prompt

    def _template(self, dataset: str) -> str:
        path = self.prompts or self.data / _PROMPTS
        need_files(path.parent, [path.name], SOURCE)
        return read_templates(path, [dataset])[dataset]

    def _case(
        self, tokenizer: PreTrainedTokenizerBase, dataset: str, where: str, row: _Row, prompt: str, room: int
    ) -> Case:
        kind = DATASETS[dataset]
        text = truncate_middle(tokenizer, prompt, self.context, room, chat=kind.chat_template)
        ids, continuation = encode_pair(tokenizer, text, _answer(prompt, row.answers[0]), chat=kind.chat_template)
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1:] if kind.stop_at_newline else []
        names = [name for name in (row.official_id, row.id, where) if name is not None]
        return Case(
            f"{dataset} {names[0]}",
            ids,
            continuation[: kind.max_new_tokens],
            tuple(row.answers),
            kind.max_new_tokens,
            stop=tuple(newline),
            group=dataset,
            tags={"classes": row.all_classes} if kind.score is None else {},
        )


def _answer(prompt: str, answer: str) -> str:
    """Formats the reference so that it can follow the prompt."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"
