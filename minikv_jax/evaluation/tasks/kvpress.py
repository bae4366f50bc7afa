"""`kvpress`: rows in the format of kvpress's data sets (https://github.com/NVIDIA/kvpress), scored as there.

A method compresses a row's context without having seen the question, and several questions about one context share its
compression. Prompts, greedy answers and metrics follow kvpress's pipeline and evaluation.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from minikv_jax import files, schemas
from minikv_jax.checks import at_least, choice
from minikv_jax.evaluation.data import parquet_rows
from minikv_jax.evaluation.task import Case, Text, around, need_file, need_tokenizer, option
from minikv_jax.evaluation.tasks.kvpress_metrics import BENCHMARKS, Metrics, Sample, check_row
from minikv_jax.schemas import Schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Row(Schema, extra="allow"):
    context: Text
    question: str
    answer_prefix: str
    answer: str | int | Annotated[list[str], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class KVPress:
    """Rows with context, question, answer_prefix, answer and max_new_tokens, as in kvpress's data sets."""

    name: ClassVar[str] = "kvpress"
    summary: ClassVar[str] = "questions about compressed contexts, from rows in kvpress's format"

    data: pathlib.Path = option("a file of rows, Parquet or JSON Lines (docs/kvpress.md)", parse=pathlib.Path)
    benchmark: str = option(f"how answers are scored: {', '.join(BENCHMARKS)}", "ruler")
    data_dir: str | None = option("part of the data set that the file holds, such as 4096, for the results", None)
    query_aware: bool = option("compress the context together with the question", False, parse=bool)
    context: int | None = option("tokens of a context at most: its end is cut, as in kvpress", None, parse=int)
    max_new_tokens: int | None = option("instead of the rows' own", None, parse=int)
    limit: int | None = option("take the first N rows", None, parse=int)

    def __post_init__(self) -> None:
        at_least(1, limit=self.limit, context=self.context, max_new_tokens=self.max_new_tokens)
        choice("benchmark", self.benchmark, tuple(BENCHMARKS))
        if self.benchmark == "loogle" and importlib.util.find_spec("rouge") is None:
            raise ValueError("benchmark='loogle' needs the package rouge: pip install minikv_jax[evaluation]")
        need_file(self.data)
        for _ in self._rows():  # report a wrong row before the model is loaded
            pass

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        del positions  # a context that does not fit is refused, and cut only if asked for
        tokenizer = need_tokenizer(tokenizer)
        return [self._case(tokenizer, number, row) for number, row in enumerate(self._rows())]

    def score(self, case: Case, text: str) -> float | None:
        score = BENCHMARKS[self.benchmark].score
        return None if score is None else score(Sample(case.tags["row"], text))

    def rows(self) -> list[dict[str, Any]]:
        """Returns all columns of the rows, in the order of the cases."""
        return [row.model_dump() for row in self._rows()]

    def metrics(self, rows: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> Metrics:
        """Computes kvpress's metrics of rows from their predicted answers."""
        samples = [Sample(row, text) for row, text in zip(rows, predictions, strict=True)]
        return BENCHMARKS[self.benchmark].metrics(samples)

    def _rows(self) -> Iterator[_Row]:
        for where, values in _read(self.data, self.limit):
            row = schemas.validate(_Row, values, source=where)
            check_row(where, self.benchmark, values)
            yield row

    def _case(self, tokenizer: PreTrainedTokenizerBase, number: int, row: _Row) -> Case:
        before, after = around(tokenizer)
        context, question = (row.context + row.question, "") if self.query_aware else (row.context, row.question)
        prompt, asked = (
            tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (before + context, question + after + row.answer_prefix)
        )
        columns = row.model_dump(exclude={"context", "question", "answer_prefix", "max_new_tokens"})
        return Case(
            f"row {number}",
            prompt[: self.context],
            max_new_tokens=self.max_new_tokens or row.max_new_tokens,
            group=str(columns.get("task", "")),
            tags={"row": columns},
            question=asked,
        )


def _read(path: pathlib.Path, limit: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads the first `limit` rows of a file, each with its place for error messages."""
    if path.suffix == ".parquet":
        rows = enumerate(parquet_rows(path)[:limit], start=1)
        yield from ((f"{path}, row {number}", row) for number, row in rows)
    elif path.suffix == ".jsonl":
        yield from ((f"{path}, line {number}", row) for number, row in files.read_jsonl(path, limit))
    else:
        raise ValueError(f"{path}: expected a file that ends in .parquet or .jsonl")
