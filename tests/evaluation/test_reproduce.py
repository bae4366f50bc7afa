"""Tests the papers' tables, and their comparison with runs on rows of our own."""

import json
import pathlib
import statistics

import pytest
from support.commands import Run, run_wrongly
from support.tiny import tiny_config

from minikv_jax.evaluation import reproduce
from minikv_jax.evaluation.tasks.longbench import DATASETS
from minikv_jax.methods import lookup

TEXT = "The lamp was lit at dusk and burned until the morning, when the keeper put it out. "
TRUNCATED = 0.011  # some printed averages are cut after two digits, not rounded
ODD = {("Mistral-7B-Instruct-v0.2", "Full"): 41.27, ("Mistral-7B-Instruct-v0.2", "H2O 15%"): 38.48}


def write_set(directory: pathlib.Path, name: str, rows: int = 2, repeats: int = 4) -> None:
    lines = [{"id": i, "prompt": f"{i} {TEXT * repeats}Why?", "answers": ["at dusk"]} for i in range(rows)]
    if DATASETS[name].score is None:
        lines = [line | {"all_classes": ["at dusk", "never"]} for line in lines]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("paper", reproduce.PAPERS)
def test_tables_are_consistent(paper: str):
    table = reproduce.published(paper)
    assert next(iter(table.methods.values())) == "full"
    for text in table.methods.values():
        lookup.parse(text)
    for name, model in table.models.items():
        assert set(model.sets) <= DATASETS.keys()
        assert set(model.scores) <= set(table.methods)
        assert next(iter(table.methods)) in model.scores
        assert all(table.model_name(f"some/{hub_name}") == name for hub_name in model.names)
        for label, average in model.averages.items():
            expected = ODD.get((name, label), average) if paper == "minikv" else average
            assert statistics.mean(model.scores[label]) == pytest.approx(expected, abs=TRUNCATED)


def test_papers_and_budgets():
    assert reproduce.PAPERS == ("kivi", "minikv", "snapkv")
    minikv = reproduce.published("minikv")
    assert minikv.models["LLaMA2-7B-chat"].averages["MiniKV Pyramid"] / 35.19 == pytest.approx(0.985, abs=5e-4)
    for label, share in (("H2O 15%", 0.15), ("SnapKV 15%", 0.15), ("PyramidKV 15%", 0.15), ("Q-Hitter 59%", 0.59)):
        method = lookup.parse(minikv.methods[label])
        kept = method.heavy.tokens(4096) + method.recent.tokens(4096)
        assert kept == pytest.approx(share * 4096, abs=2)
    assert lookup.parse(reproduce.published("snapkv").methods["SnapKV: 2048"]).heavy.tokens(99999) == 2016


def test_the_plan_names_missing_sets_and_methods(tmp_path: pathlib.Path):
    table = reproduce.published("minikv")
    for name in ("lcc", "gov_report", "narrativeqa"):
        write_set(tmp_path, name)
    config = tiny_config(max_position_embeddings=8192, head_dim=16)
    plan = reproduce.plan(table, "LLaMA2-7B-chat", config, tmp_path)
    assert plan.sets == ("lcc", "gov_report")  # narrativeqa is not in the table
    assert len(plan.missing) == 11
    assert plan.task.context == 4096
    assert list(plan.skipped) == ["Q-Hitter 59%"]  # groups of 32 in a head of 16
    assert plan.methods.keys() | plan.skipped.keys() == table.methods.keys()
    small = tiny_config(max_position_embeddings=2048)
    assert reproduce.plan(table, "LLaMA2-7B-chat", small, tmp_path).task.context == 2048 - 512
    assert reproduce.plan(table, "LLaMA2-7B-chat", small, tmp_path, max_prompt=100).task.context == 100
    with pytest.raises(ValueError, match="'LLaMA9': expected one of LLaMA2-7B-chat"):
        reproduce.plan(table, "LLaMA9", config, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of qasper\.jsonl"):
        reproduce.plan(table, "LLaMA2-7B-chat", config, tmp_path / "none")


def test_differences_and_recovered_shares(tmp_path: pathlib.Path):
    table = reproduce.published("minikv")
    for name in ("lcc", "trec"):
        write_set(tmp_path, name)
    plan = reproduce.plan(table, "LLaMA2-7B-chat", tiny_config(max_position_embeddings=8192), tmp_path)
    means = {
        label: {"groups": {"lcc": {"score": score}, "trec": {} if label == "KIVI" else {"score": 0.5}}}
        for label, score in zip(table.methods, (0.60, 0.59, 0.58, 0.57, 0.56, 0.55, 0.54, 0.53), strict=True)
    }
    comparison = reproduce.compare(plan, {"means": means})
    full, minikv = comparison.ours["Full"], comparison.ours["MiniKV"]
    assert full.scores == {"lcc": 60.0, "trec": 50.0}
    assert minikv.recovered == pytest.approx(52 / 55)
    paper = comparison.paper["MiniKV"]
    assert paper.mean == pytest.approx((58.38 + 59.00) / 2)
    assert paper.recovered == pytest.approx((58.38 + 59.00) / (59.56 + 59.67))
    assert (comparison.ours["KIVI"].mean, comparison.ours["KIVI"].recovered) == (None, None)
    text = reproduce.comparison_table(plan, comparison)
    lcc = list(text.columns).index("Lcc")
    place = [row[0] for row in text.rows].index("MiniKV")
    our_row, paper_row, difference = text.rows[place : place + 3]
    assert our_row[lcc] == "54.00"
    assert (paper_row[lcc], difference[lcc]) == ("58.38", "-4.38")
    assert paper.recovered is not None
    assert difference[-1] == f"{100 * (52 / 55 - paper.recovered):+.1f}"
    assert paper_row[text.columns.index("Qasper")] == "21.01"  # not run, but printed


def test_the_command_prints_every_method_and_names_what_is_missing(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path
):
    for name in ("lcc", "triviaqa"):
        write_set(tmp_path, name)
    out = tmp_path / "out.json"
    command = ["reproduce", "kivi", "--model", model_directory, "--data", tmp_path]
    code, text, _ = run(*command, "--limit", 1, "--batch", 2, "--max-prompt", 90, "--json", out)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith(
        "| method |  | Qasper | QMSum | MNews | TREC | Trivia | SAMSum | Lcc | RB-P | mean of 2 |"
    )
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == ["16 bit", "", ""]
    assert "Paper: KIVI, arXiv 2402.02750v2, table 4, Llama2-7B-Chat." in text
    assert "The paper's scores are not of tiny" in text
    assert "Prompts are cut to 90 tokens" in text
    assert "Only the first 1 cases" in text
    assert "Sets without data: qasper, qmsum, multi_news, trec, samsum, repobench-p." in text
    assert "KIVI-4 was not run: " in text  # groups of 32 in a head of 16
    report = json.loads(out.read_text())
    assert report["comparison"]["KIVI-2"]["ours"] is None
    assert report["comparison"]["16 bit"]["paper"]["recovered"] == 1
    assert [case["prompt_tokens"] <= 90 for case in report["cases"]] == [True, True]


def test_wrong_options_are_named(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    write_set(tmp_path, "lcc")
    assert "h2o" in run_wrongly(run, "reproduce", "h2o", "--model", model_directory)
    command = ["reproduce", "minikv", "--model", model_directory, "--data", tmp_path]
    assert "'Llama-9'" in run_wrongly(run, *command, "--as", "Llama-9")
    assert "max_prompt=2000: beside the longest answer" in run_wrongly(run, *command, "--max-prompt", 2000)
    (tmp_path / "lcc.jsonl").write_text('{"context": "x", "input": "y", "answers": ["z"]}\n')
    assert "dataset2prompt.json" in run_wrongly(run, *command)
