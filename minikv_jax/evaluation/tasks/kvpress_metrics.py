"""Metrics of whole data sets as kvpress's evaluation defines them (https://github.com/NVIDIA/kvpress).

Each function takes rows with their predicted answers and returns the values of kvpress's metrics.json. LooGLE's METEOR
and BERTScore are left out, because they need downloaded dictionaries and models.
"""

from __future__ import annotations

import ast
import collections
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minikv_jax.checks import shown

_CONTROL = re.compile(r"[\x00-\x1f]")
_ROUGE = ("rouge-1", "rouge-2", "rouge-l")


class Sample(NamedTuple):
    """A row of a data set, with the answer that a model gave."""

    row: Mapping[str, Any]
    prediction: str

    @property
    def references(self) -> list[str]:
        """The row's answer, or its answers, as texts."""
        answer = self.row["answer"]
        return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]


Metrics = dict[str, Any]


class Benchmark(NamedTuple):
    """How a benchmark is scored.

    Attributes:
      metrics: the values of metrics.json.
      score: of one answer, from 0 to 1; None if the benchmark publishes no references.
      columns: columns that the metrics read, besides those of every row.
    """

    metrics: Callable[[Sequence[Sample]], Metrics]
    score: Callable[[Sample], float] | None
    columns: tuple[str, ...] = ()


def ruler_score(sample: Sample) -> float:
    """Share of the references in the answer; for question answering (`qa_*`), whether any of them is (RULER)."""
    text = _CONTROL.sub("", sample.prediction.strip()).strip().lower()
    found = [reference.lower() in text for reference in sample.references]
    return float(any(found)) if sample.row["task"].split("_")[0] == "qa" else sum(found) / len(found)


def ruler(samples: Sequence[Sample]) -> Metrics:
    """Mean `ruler_score` of each task, in percent."""
    groups = _by("task", samples)
    return {task: {"string_match": round(_mean(map(ruler_score, own)) * 100, 2)} for task, own in groups.items()}


def loogle_score(sample: Sample) -> float:
    """Share of the right entities for `shortdep_cloze`, otherwise recall of ROUGE-L."""
    if sample.row["task"] == "shortdep_cloze":
        right, count = _cloze(sample, exactly=True)
        return right / count
    return _rouge_recall(sample)["rouge-l"]


def loogle(samples: Sequence[Sample]) -> Metrics:
    """Exact and partial matches of `shortdep_cloze`; BLEU-1, BLEU-4 and the recall of ROUGE for the other tasks."""
    metrics: Metrics = {}
    for task, own in _by("task", samples).items():
        if task == "shortdep_cloze":
            metrics[task] = {"exact_match": _cloze_share(own, exactly=True)}
            metrics[task]["partial_match"] = _cloze_share(own, exactly=False)
            continue
        rows = [{"bleu1": _bleu(s, 1), "bleu4": _bleu(s, 4), **_rouge_recall(s)} for s in own]
        metrics[task] = {name: _mean(row[name] for row in rows) for name in rows[0]}
    return metrics


def _cloze_share(samples: Sequence[Sample], *, exactly: bool) -> float:
    right, counts = zip(*(_cloze(sample, exactly=exactly) for sample in samples), strict=True)
    return round(sum(right) / sum(counts), 4)


def _cloze(sample: Sample, *, exactly: bool) -> tuple[int, int]:
    """Right entities, and the number that counts: that of the masks, but 1 if an exact match has no dictionary."""
    expected = json.loads(sample.references[0])
    try:
        given = ast.literal_eval(sample.prediction)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return (0, 1) if exactly else (0, len(expected))
    if exactly:
        return sum(given.get(mask) == entity for mask, entity in expected.items()), len(expected)
    texts = {mask: given.get(mask, "") for mask in expected}
    if not all(isinstance(text, str) for text in texts.values()):
        return 0, len(expected)
    return sum(bool({*texts[mask].split()} & {*entity.split()}) for mask, entity in expected.items()), len(expected)


def _bleu(sample: Sample, size: int) -> float:
    """BLEU of the n-grams of one size only, without smoothing (Papineni et al. 2002, section 2)."""
    words, reference = (text.replace("\n", " ").split() for text in (sample.prediction, sample.references[0]))
    if not _precision(words, reference, 1):
        return 0.0
    brevity = 1.0 if len(words) > len(reference) else math.exp(1 - len(reference) / len(words))
    return brevity * (_precision(words, reference, size) or sys.float_info.min)


def _precision(words: Sequence[str], reference: Sequence[str], size: int) -> float:
    given, known = (
        collections.Counter(tuple(text[i : i + size]) for i in range(len(text) - size + 1))
        for text in (words, reference)
    )
    return sum((given & known).values()) / max(sum(given.values()), 1)


def _rouge_recall(sample: Sample) -> dict[str, float]:
    from rouge import Rouge  # optional

    try:
        scores: Any = Rouge().get_scores(hyps=[sample.prediction], refs=[sample.references[0]])
    except (ValueError, RecursionError):  # a text without words, or a very long one
        return dict.fromkeys(_ROUGE, 0.0)
    return {name: float(scores[0][name]["r"]) for name in _ROUGE}


def longbench_v2_score(sample: Sample) -> float:
    """Whether the answer says "The correct answer is X", with or without parentheses (LongBench-v2)."""
    text = sample.prediction.replace("*", "")
    return float(any(f"The correct answer is {form}" in text for form in _forms(sample.references[0])))


def _forms(letter: str) -> tuple[str, str]:
    return f"({letter})", letter


def longbench_v2(samples: Sequence[Sample]) -> Metrics:
    """Mean score over all rows, and over those of each difficulty and length."""
    means = {"average": _mean(map(longbench_v2_score, samples))}
    for column in ("difficulty", "length"):
        means |= {name: _mean(map(longbench_v2_score, own)) for name, own in _by(column, samples).items()}
    return means


def aime_score(sample: Sample) -> float:
    r"""Whether the last \boxed{} holds the answer; without one, the text up to a brace."""
    return float(sample.prediction.split("boxed{")[-1].split("}")[0] == sample.references[0])


def math_score(sample: Sample) -> float:
    r"""Whether the first \boxed{} holds the answer, up to its first closing brace."""
    boxes = sample.prediction.split("boxed{")
    return float(len(boxes) > 1 and boxes[1].split("}")[0] == sample.references[0])


def _boxed(score: Callable[[Sample], float]) -> Callable[[Sequence[Sample]], Metrics]:
    def metrics(samples: Sequence[Sample]) -> Metrics:
        correct = int(sum(map(score, samples)))
        answered = sum("boxed{" in sample.prediction for sample in samples)
        total = len(samples)
        return {"correct": correct, "answered": answered, "accuracy": correct / total, "total": total}

    return metrics


def _by(column: str, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Groups samples by a column, in order of its values."""
    groups: dict[str, list[Sample]] = {}
    for name in sorted({sample.row[column] for sample in samples}):
        groups[name] = [sample for sample in samples if sample.row[column] == name]
    return groups


def _mean(values: Any) -> float:
    return float(statistics.fmean(values))


BENCHMARKS = {
    "ruler": Benchmark(ruler, ruler_score, ("task",)),
    "loogle": Benchmark(loogle, loogle_score, ("task",)),
    "zero_scrolls": Benchmark(lambda samples: {}, None),
    "longbench-v2": Benchmark(longbench_v2, longbench_v2_score, ("difficulty", "length")),
    "aime25": Benchmark(_boxed(aime_score), aime_score),
    "math500": Benchmark(_boxed(math_score), math_score),
}


def check_row(where: str, benchmark: str, row: Mapping[str, Any]) -> None:
    """Raises ValueError if a row lacks what the benchmark's metrics read."""
    for column in BENCHMARKS[benchmark].columns:
        if not isinstance(row.get(column), str):
            raise ValueError(f"{where}: {column} is {shown(row.get(column))}; accepted: a text, for {benchmark}")
    if row.get("task") == "shortdep_cloze" and benchmark == "loogle":
        _check_cloze(where, row["answer"])


def _check_cloze(where: str, answer: Any) -> None:
    try:
        entities = json.loads(answer)
    except (TypeError, ValueError):
        entities = None
    if not isinstance(entities, dict) or not entities or not all(isinstance(e, str) for e in entities.values()):
        raise ValueError(f"{where}: answer is {shown(answer)}; accepted: a JSON object of masks and entities")
