"""Tests rows in kvpress's format: prompts, metrics, and the files of its leaderboard."""

import csv
import json
import pathlib
import sys
from typing import Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from support.commands import Run, run_wrongly
from support.model_directory import byte_tokenizer

from minikv_jax.evaluation.tasks.kvpress import KVPress
from minikv_jax.evaluation.tasks.kvpress_metrics import BENCHMARKS, Sample

STORY = "The keeper lit the lamp at dusk. Its number is 4711. " * 4
ROWS: list[dict[str, Any]] = [
    {"context": STORY, "question": "What is the number?", "answer": ["4711"], "task": "niah_single_1"},
    {"context": STORY, "question": "Who lit the lamp?", "answer": ["keeper", "nobody"], "task": "qa_1"},
    {"context": "Nothing happened. " * 9, "question": "What?", "answer": ["nothing", "more"], "task": "vt"},
]
ROWS = [row | {"answer_prefix": " Answer:", "max_new_tokens": 5} for row in ROWS]


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def samples(*rows: tuple[Any, str, dict[str, str]]) -> list[Sample]:
    return [Sample({"answer": answer} | columns, text) for answer, text, columns in rows]


def test_prompt_and_question_are_kvpress_s(data: pathlib.Path):
    """The template's text goes around both; the question, what follows it and the prefix are not compressed."""
    tokenizer = byte_tokenizer()
    cases = KVPress(data=data).cases(tokenizer, 1000)
    assert [case.name for case in cases] == ["row 0", "row 1", "row 2"]
    assert cases[0].prompt == cases[1].prompt
    assert tokenizer.decode(list(cases[0].prompt)) == f"<|user|>{STORY}"
    asked = str(tokenizer.decode(list(cases[0].question)))
    assert asked.startswith("What is the number?")
    assert asked.endswith("<|assistant|> Answer:")
    aware = KVPress(data=data, query_aware=True).cases(tokenizer, 1000)[0]
    assert aware.prompt + aware.question == cases[0].prompt + cases[0].question
    assert tokenizer.decode(list(aware.prompt)) == f"<|user|>{STORY}What is the number?"
    cut = KVPress(data=data, context=50, max_new_tokens=3).cases(tokenizer, 1000)[0]
    assert (cut.prompt, cut.max_new_tokens) == (cases[0].prompt[:50], 3)
    (plain, *_) = KVPress(data=data).cases(byte_tokenizer(chat_template=None), 1000)
    assert tokenizer.decode(list(plain.question)) == "What is the number?\n Answer:"


def test_parquet_and_json_lines_agree(data: pathlib.Path, tmp_path: pathlib.Path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert KVPress(data=path).rows() == KVPress(data=data).rows() == ROWS


def test_ruler_counts_references_and_for_questions_any():
    rows = [
        (["alpha", "beta"], " ALPHA\x01 and gamma", {"task": "niah_multivalue"}),
        (["1"], "no", {"task": "niah_multivalue"}),
        (["paris", "france"], "It is Paris.", {"task": "qa_2"}),
    ]
    assert BENCHMARKS["ruler"].metrics(samples(*rows)) == {
        "niah_multivalue": {"string_match": 25.0},
        "qa_2": {"string_match": 100.0},
    }


def test_loogle_counts_masks_and_words():
    cloze = {"task": "shortdep_cloze"}
    answer = json.dumps({"<mask-0>": "Ann Lee", "<mask-1>": "Rome"})
    rows = [
        (answer, "{'<mask-0>': 'Ann Lee', '<mask-1>': 'Paris'}", cloze),
        (answer, "{'<mask-0>': 'Ann', '<mask-1>': 'Rome'}", cloze),
        (answer, "__import__('os')", cloze),  # no dictionary, and nothing is run
    ]
    metrics = BENCHMARKS["loogle"].metrics(samples(*rows))
    assert metrics == {"shortdep_cloze": {"exact_match": 2 / 5, "partial_match": 3 / 6}}
    text = ("the cat sat on the mat", "the cat on the mat today", {"task": "shortdep_qa"})
    (values,) = BENCHMARKS["loogle"].metrics(samples(text)).values()
    assert values["bleu1"] == pytest.approx(5 / 6)  # as many words: no brevity penalty
    assert values["bleu4"] == pytest.approx(sys.float_info.min)
    assert values["rouge-1"] == pytest.approx(1 - 1 / 5)  # "sat" of the five different words is missing
    empty = BENCHMARKS["loogle"].metrics(samples(("a b", "", {"task": "longdep_qa"})))
    assert set(empty["longdep_qa"].values()) == {0.0}


def test_the_other_benchmarks_read_the_letter_or_the_box():
    easy, hard = {"difficulty": "easy", "length": "short"}, {"difficulty": "hard", "length": "short"}
    rows = samples(("B", "The correct answer is **(B)**", easy), ("C", "The correct answer is D", hard))
    assert BENCHMARKS["longbench-v2"].metrics(rows) == {"average": 0.5, "easy": 1.0, "hard": 0.0, "short": 0.5}
    rows = samples((70, r"\boxed{1} or \boxed{70}", {}), (5, "five", {}), ("6", r"\boxed{6}", {}))
    assert BENCHMARKS["aime25"].metrics(rows) == {"correct": 2, "answered": 2, "accuracy": 2 / 3, "total": 3}
    assert BENCHMARKS["math500"].metrics(rows) == {"correct": 1, "answered": 2, "accuracy": 1 / 3, "total": 3}
    assert BENCHMARKS["zero_scrolls"].metrics(rows) == {}


@pytest.mark.parametrize(
    ("change", "benchmark", "message"),
    [
        ({"question": 3}, "ruler", "line 1: question is 3; accepted: text"),
        ({"max_new_tokens": 0}, "ruler", "line 1: max_new_tokens is 0; accepted: at least 1"),
        ({"task": None}, "ruler", "line 1: task is None; accepted: a text, for ruler"),
        ({}, "longbench-v2", "line 1: difficulty is None; accepted: a text, for longbench-v2"),
        ({"task": "shortdep_cloze"}, "loogle", "accepted: a JSON object of masks and entities"),
        ({}, "nosuch", "benchmark='nosuch': expected one of ruler, loogle, zero_scrolls"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: pathlib.Path, change: dict[str, Any], benchmark: str, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0] | change) + "\n")
    with pytest.raises(ValueError, match=message):
        KVPress(data=path, benchmark=benchmark)


def test_a_file_of_another_kind_is_named(tmp_path: pathlib.Path):
    (tmp_path / "rows.csv").write_text("context\n")
    with pytest.raises(ValueError, match=r"rows.csv: expected a file that ends in .parquet or .jsonl"):
        KVPress(data=tmp_path / "rows.csv")


def test_results_are_written_for_the_leaderboard(
    run: Run, model_directory: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
):
    out, report = tmp_path / "results", tmp_path / "report.json"
    command = ["evaluate", "kvpress", "--model", model_directory, "--data", data, "--data-dir", "4096", "--batch", 2]
    command += ["--method", "full", "--method", "tova:heavy=0.5", "--query-aware", "--out", out, "--json", report]
    code, text, _ = run(*command)
    assert code == 0
    assert "| tova:heavy=0.5 |" in text
    model = model_directory.name
    names = [f"ruler__4096__{model}__{name}__query_aware" for name in ("no_press__0.00", "tova-heavy=0.5__0.50")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert {path.name for path in (out / names[0]).iterdir()} == {"predictions.csv", "metrics.json", "config.yaml"}
    cases = json.loads(report.read_text())["cases"]
    for name, method in zip(names, ("full", "tova:heavy=0.5"), strict=True):
        with (out / name / "predictions.csv").open(newline="") as stream:
            predictions = list(csv.DictReader(stream))
        assert "context" not in predictions[0]
        answers = [case["methods"][method]["text"] for case in cases]
        assert [row["predicted_answer"] for row in predictions] == answers
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert metrics == KVPress(data=data).metrics(KVPress(data=data).rows(), answers)
        config = yaml.safe_load((out / name / "config.yaml").read_text())
        assert (config["dataset"], config["data_dir"], config["query_aware"]) == ("ruler", "4096", True)
        assert f"{config['compression_ratio']:.2f}" in name
    assert run(*command)[0] == 0
    assert (out / names[0] / "1" / "metrics.json").is_file()  # a second run keeps the first
    assert "limit=1: results for the leaderboard are of all rows" in run_wrongly(run, *command, "--limit", 1)
