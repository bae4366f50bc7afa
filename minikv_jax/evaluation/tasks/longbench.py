"""`longbench`: LongBench v1 and LongBench-E (arXiv 2308.14508), from data in the official formats.

The directory holds `<dataset>.jsonl` (`<dataset>_e.jsonl` for E) with the official fields, and `dataset2prompt.json`,
the benchmark's own prompts; or rows with a complete `prompt` and `answers`. Prompts, the lengths of answers, which data
sets go without a chat template, and the scores follow the benchmark's code (pred.py, metrics.py, config/).
"""

from __future__ import annotations

import dataclasses
import functools
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

SOURCE = "they come from the LongBench repository (config/) and its data set THUDM/LongBench (data.zip)"
_PROMPTS = "dataset2prompt.json"


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


@dataclasses.dataclass(frozen=True)
class LongBench:
    """The English and code sets, with the official scores. `nll` and `kl_to_full` are those of the first reference.

    A prompt over `context` tokens loses its middle before the chat template is put around it.
    """

    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "LongBench v1 or E, from a directory in the official formats"

    data: pathlib.Path = option(
        f"a directory with DATASET.jsonl and {_PROMPTS}, or a data set on the hub (THUDM/LongBench)",
        parse=pathlib.Path,
        hub=("data.zip", "*.jsonl", _PROMPTS),
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
        self._datasets()

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        tokenizer = need_tokenizer(tokenizer)
        cases = []
        datasets = self._datasets()
        positions -= max(DATASETS[dataset].max_new_tokens for dataset in datasets)
        for dataset in datasets:
            path = self.data / self._file(dataset)
            for number, row in read_jsonl(path, self.limit):
                where = f"{path}, line {number}"
                prompt = row["prompt"] if "prompt" in row else self._prompt(dataset, where, row)
                cases.append(self._case(tokenizer, dataset, where, row, prompt, positions))
        return cases

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

    def _prompt(self, dataset: str, where: str, row: Mapping[str, Any]) -> str:
        need_fields(where, row, ("context", "input"))
        path = self.prompts or self.data / _PROMPTS
        need_files(path.parent, [path.name], SOURCE)
        template = _templates(path).get(dataset)
        if not isinstance(template, str):
            raise ValueError(f"{path} has no prompt for {dataset}")
        return fill(template, {name: row[name] for name in ("context", "input")})

    def _case(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: str,
        where: str,
        row: Mapping[str, Any],
        prompt: str,
        room: int,
    ) -> Case:
        need_fields(where, row, ("answers",))
        if not row["answers"]:
            raise ValueError(f"{where}: answers is empty")
        kind = DATASETS[dataset]
        if kind.score is None:
            need_fields(where, row, ("all_classes",))
        text = truncate_middle(tokenizer, prompt, self.context, room, chat=kind.chat_template)
        ids, continuation = encode_pair(tokenizer, text, _answer(prompt, row["answers"][0]), chat=kind.chat_template)
        newline = tokenizer.encode("\n", add_special_tokens=False)[-1:] if kind.stop_at_newline else []
        return Case(
            f"{dataset} {row.get('_id', row.get('id', where))}",
            ids,
            continuation[: kind.max_new_tokens],
            tuple(row["answers"]),
            kind.max_new_tokens,
            stop=tuple(newline),
            group=dataset,
            tags={"classes": row["all_classes"]} if kind.score is None else {},
        )


def _answer(prompt: str, answer: str) -> str:
    """The reference as it would follow the prompt."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


@functools.cache
def _templates(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
