"""Tests `minikv evaluate`: the tasks `cases` and `perplexity`, and texts that are compressed without their question."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.commands import Run, run_wrongly
from support.model_directory import byte_tokenizer

TEXT = "The lamp was lit at dusk and burned until the morning, when the keeper put it out. " * 12


def test_cases_of_ids_and_of_text_agree(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    prompt, continuation = TEXT[:150], TEXT[150:170]
    ids = [byte_tokenizer().encode(text) for text in (prompt, continuation)]
    rows = [
        {"prompt": prompt, "continuation": continuation},
        {"prompt_ids": ids[0], "continuation_ids": ids[1]},
    ]
    data, out = tmp_path / "cases.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    command = ["evaluate", "cases", "--data", data, "--model", model_directory, "--json", out]
    command += ["--method", "full", "--method", "minikv", "--method", "minikv:k_bits=4", "--set", "tail.length=32"]
    code, text, _ = run(*command)
    assert code == 0
    report = json.loads(out.read_text())
    first, second = report["cases"]
    assert first["methods"] == second["methods"]
    assert first["methods"]["full"]["kl_to_full"] == 0
    assert (first["prompt_tokens"], first["continuation_tokens"]) == (150, 20)
    for name in ("minikv", "minikv:k_bits=4"):
        assert report["methods"][name]["tail"]["length"] == 32
        assert first["methods"][name]["nll"] == report["means"][name]["nll"]
        assert f"| {name} | {report['means'][name]['nll']:.4f} |" in text
    assert report["means"]["minikv:k_bits=4"]["kl_to_full"] < report["means"]["minikv"]["kl_to_full"]

    written = out.read_bytes()
    assert run(*command)[0] == 0
    assert out.read_bytes() == written  # the same command gives the same numbers, and the same file


def test_budget_bytes_makes_a_method_per_share(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    (tmp_path / "book.txt").write_text(TEXT)
    out = tmp_path / "out.json"
    command = ["evaluate", "perplexity", "--text", tmp_path / "book.txt", "--model", model_directory, "--json", out]
    sizes = ["--context", 200, "--continuation", 10, "--limit", 2, "--batch", 2]
    code, _, _ = run(*command, *sizes, "--method", "h2o", "--budget-bytes", "0.25,0.5")
    assert code == 0
    means = json.loads(out.read_text())["means"]
    assert list(means) == ["h2o @ 0.25", "h2o @ 0.5"]
    for share, row in zip((0.25, 0.5), means.values(), strict=True):
        assert share - 0.02 < row["cache_bytes"] / row["full_cache_bytes"] <= share


PLUGIN = """
import dataclasses, jax.numpy as jnp, minikv_jax
from minikv_jax import lookup

@minikv_jax.register_scorer("newest-even")
class NewestEven(minikv_jax.Scorer):
    every: int = 2

    def score(self, inputs):
        batch, tokens, kv_heads, _ = inputs.k.shape
        positions = jnp.arange(tokens, dtype=jnp.float32)
        return jnp.broadcast_to(positions * (positions % self.every == 0), (batch, kv_heads, tokens))

@minikv_jax.register_quantizer("broken")
class Broken(minikv_jax.Quantizer):
    def encode(self, x, operand):
        return x * jnp.nan

    def decode(self, stored, operand):
        return stored

@minikv_jax.register_scorer("nan")
def nan(inputs):
    return NewestEven().score(inputs).at[:, 0, 3].set(jnp.nan)

method = dataclasses.replace(lookup.get("h2o"), name="even", scorer=NewestEven())
minikv_jax.register_method(method)
minikv_jax.register_method(dataclasses.replace(method, name="nan", scorer=nan))
minikv_jax.register_method(dataclasses.replace(lookup.get("minikv"), name="broken", quantizer=Broken()))
"""


def test_a_plugins_methods_run_and_nan_is_reported(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    plugin, data, out = tmp_path / "mine.py", tmp_path / "cases.jsonl", tmp_path / "out.json"
    plugin.write_text(PLUGIN)
    data.write_text(json.dumps({"prompt": TEXT[:150], "continuation": TEXT[150:170]}))
    command = ["evaluate", "cases", "--data", data, "--model", model_directory, "--json", out, "--plugin", plugin]
    code, _, log = run(*command, "--method", "h2o", "--method", "even", "--method", "nan", "--method", "broken")
    assert code == 0, log
    means = json.loads(out.read_text())["means"]
    assert means["even"]["cache_bytes"] == means["h2o"]["cache_bytes"]
    assert means["even"]["nll"] != means["h2o"]["nll"]
    for name in ("nan", "broken"):
        assert means[name]["not_finite"] == 1
        assert "nll" not in means[name]
        assert f"{name}: NaN or infinite logits, or scores that are NaN, in 1 of 1 cases" in log


def test_a_researchers_path(
    run: Run,
    model_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
):
    """A user's own method goes from its file through `evaluate` and `sweep` to a report; records the times."""
    plugin, out = pathlib.Path(__file__).parents[2] / "examples" / "plugin_scorer.py", tmp_path / "sweep"
    (tmp_path / "book.txt").write_text(TEXT)
    vatp = "vatp:group_size=16"  # the tiny model's heads
    common = ["--model", model_directory, "--plugin", plugin, "--method", vatp, "--method", "h2o"]
    task = ["perplexity", "--text", tmp_path / "book.txt", "--context", 200, "--continuation", 10, "--limit", 1]
    began = time.perf_counter()
    code, text, log = run("evaluate", *task, *common)
    evaluated = time.perf_counter()
    assert code == 0, log
    assert f"| {vatp} |" in text
    code, text, log = run("sweep", *task, *common, "--sweep", "heavy=0.1,0.3", "--out", out)
    swept = time.perf_counter()
    assert code == 0, log
    points = json.loads((out / "results.json").read_text())["points"]
    assert [point["method"] for point in points.values()] == [vatp] * 2 + ["h2o"] * 2
    small, large = (points[f"{vatp},heavy={share}"]["means"] for share in (0.1, 0.3))
    assert small["cache_bytes"] < large["cache_bytes"]
    assert f"{vatp},heavy=0.3" in (out / "report.html").read_text()
    took = f"evaluate {evaluated - began:.1f} s, sweep and report {swept - evaluated:.1f} s"
    record_property("took", took)
    with capsys.disabled():
        print(f"\na plugin file, {took}")


FLAT = """
import minikv_jax as mk

@mk.register_scorer("flat")
def flat(inputs):
    return inputs.k.sum(axis=(2, 3)).astype("float32")

mk.register_method(mk.Method(name="flat", scorer=flat, heavy=0.5, recent=0.1))
"""
CASES = ["evaluate", "cases", "--model", "{model}", "--method", "minikv", "--data"]
BOOK = ["evaluate", "perplexity", "--model", "{model}", "--text", "{scratch}/book.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*CASES, "{scratch}/bad.jsonl"], "bad.jsonl, line 2 is not valid JSON"),
        ([*CASES, "{scratch}/list.jsonl"], "line 1: expected a JSON object, got a list"),
        ([*CASES, "{scratch}/fields.jsonl"], "line 1: unknown keys 'answer'; accepted: prompt_ids, continuation_ids, "),
        (
            [*CASES, "{scratch}/forms.jsonl"],
            "line 1: has continuation_ids, prompt: expected prompt_ids and continuation",
        ),
        ([*CASES, "{scratch}/kinds.jsonl"], "line 1: prompt_ids is 'a'; accepted: a list"),
        ([*CASES, "{scratch}/ids.jsonl"], "line 1: prompt_ids[1] is -2; accepted: at least 0"),
        ([*CASES, "{scratch}/no-text.jsonl"], "line 1: continuation is ''; accepted: text of at least 1 characters"),
        # Rows are checked before the model is loaded.
        ([*CASES, "{scratch}/ids.jsonl", "--model", "neither"], "line 1: prompt_ids[1] is -2; accepted: at least 0"),
        ([*CASES, "{scratch}/long.jsonl"], "line 1: 1020 prompt + 10 continuation tokens exceed the model's 1024"),
        ([*CASES, "{scratch}/outside.jsonl"], "outside.jsonl: line 1: token id 999 is outside the vocabulary"),
        ([*CASES, "{scratch}/empty.jsonl"], "empty.jsonl is empty"),
        ([*CASES, "{scratch}/nosuch.jsonl"], "nosuch.jsonl"),
        ([*CASES, "{scratch}/good.jsonl", "--limit", "0"], "limit=0"),
        ([*CASES, "{scratch}/good.jsonl", "--batch", "0"], "batch=0"),
        ([*CASES, "{scratch}/good.jsonl", "--method", "minikv"], "'minikv' is given twice"),
        ([*CASES, "{scratch}/good.jsonl", "--method", "h2o:heavy"], "NAME:KEY=VALUE"),
        ([*CASES, "{scratch}/good.jsonl", "--set", "heavy"], "expected KEY=VALUE"),
        ([*CASES, "{scratch}/good.jsonl", "--set", "group_size=32"], "head_dim 16"),
        ([*CASES, "{scratch}/good.jsonl", "--implementation", "nosuch"], "implementation='nosuch'"),
        ([*CASES, "{scratch}/good.jsonl", "--budget-bytes", "2"], "expected shares above 0"),
        ([*CASES, "{scratch}/good.jsonl", "--budget-bytes", "0.01"], "does not fit 1.00%"),
        ([*CASES, "{scratch}/good.jsonl", "--plugin", "{scratch}/fails.py"], "fails.py (fails.py, line 2)"),
        ([*CASES, "{scratch}/good.jsonl", "--plugin", "{scratch}/none.py"], "none.py does not exist"),
        (
            [*CASES, "{scratch}/good.jsonl", "--plugin", "{scratch}/flat.py", "--method", "flat"],
            "scorer 'flat' returns float32[2, 96] (flat.py, line 4): expected floating-point [2, 2, 96]",
        ),
        (["evaluate", "nosuch"], "invalid choice: 'nosuch'"),
        ([*BOOK, "--method", "full", "--context", "2000"], "context=2000 + continuation=120 exceed"),
        ([*BOOK, "--method", "full", "--context", "99", "--limit", "9"], "9 windows of 219 need 1971"),
        (BOOK, "--method"),
        # Options are checked before the model is loaded.
        ([*BOOK, "--method", "full", "--limit", "0", "--model", "nosuch"], "limit=0"),
        ([*BOOK, "--method", "full", "--text", "nosuch", "--model", "neither"], "nosuch does not exist"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], message: str
):
    good = json.dumps({"prompt": "hello", "continuation": "you"})
    for name, text in {
        "bad": good + "\n{",
        "list": "[1]",
        "fields": '{"prompt": "a", "answer": "b"}',
        "forms": '{"prompt": "a", "continuation_ids": [1]}',
        "ids": '{"prompt_ids": [1, -2], "continuation_ids": [1]}',
        "kinds": '{"prompt_ids": "a", "continuation_ids": [1]}',
        "no-text": '{"prompt": "a", "continuation": ""}',
        "long": json.dumps({"prompt_ids": [1] * 1020, "continuation_ids": [1] * 10}),
        "outside": '{"prompt_ids": [999], "continuation_ids": [1]}',
        "empty": "\n",
        "good": good,
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "fails.py").write_text("\nimport nosuch\n")
    (tmp_path / "flat.py").write_text(FLAT)
    assert message in run_wrongly(run, *(text.format(model=model_directory, scratch=tmp_path) for text in arguments))


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(["variable-tracking", "--hops", 1], id="variables"),
        pytest.param(
            ["common-words-extraction", "--words", 2, "--frequency", 3, "--other-frequency", 2],
            id="words",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_text_is_compressed_without_its_question(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, task: list[Any]
):
    command = ["evaluate", *task, "--context", 500, "--model", model_directory, "--json", tmp_path / "out.json"]
    code, text, log = run(*command, "--method", "criticalkv:heavy=40,recent=16")
    assert code == 0, log
    assert "| score |" in text
    (row,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert row["prompt_tokens"] < 500 - len("What are the")  # the question comes on top
    ((_, result),) = row["methods"].items()
    assert result["kl_to_full"] > 0
    assert 0 <= result["score"] <= 1
