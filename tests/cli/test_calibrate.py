"""Tests `minikv calibrate`, and `minikv evaluate` with a saved calibration."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from support.commands import Run, run_wrongly

from minikv_jax import files


def test_calibrate_then_evaluate(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The lamp was lit at dusk and burned until the morning. " * 8)
    method = "minikv:tail.length=32,sinks=1"
    sizes = ("--context", 80, "--queries", 10, "--limit", 2, "--steps", 5)
    learn = ("calibrate", "--model", model_directory, "--method", method, "--text", text, *sizes)
    code, printed, err = run(*learn, "--out", out)
    assert (code, err) == (0, "")
    saved = json.loads((out / "calibration.json").read_text())["details"]
    assert len(saved["curve"]) == 5
    before, after = np.mean(saved["loss_before"]), np.mean(saved["loss_after"])
    assert f"{before:.5f} -> {after:.5f}" in printed
    assert list(saved["texts"]) == ["text.txt"]
    (tmp_path / "cases.jsonl").write_text(json.dumps({"prompt_ids": list(range(60)), "continuation_ids": [7, 8]}))
    code, printed, err = run(
        "evaluate",
        "cases",
        "--model",
        model_directory,
        "--data",
        tmp_path / "cases.jsonl",
        "--method",
        method,
        "--method",
        out,
        "--method",
        f"{out}:heavy=0.1",
    )
    assert (code, err) == (0, "")
    rows = [line.split(" | ") for line in printed.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {method}", f"| {out}", f"| {out}:heavy=0.1"]
    assert rows[0][1:3] != rows[1][1:3]  # the quality differs, the bytes do not
    assert rows[0][-2] == rows[1][-2] != rows[2][-2]
    code, _, err = run(*learn, "--out", out)
    assert (code, err) == (2, f"minikv: error: {out} exists: give a new path\n")
    with files.locked(tmp_path / "other"):  # as another process does while it learns
        assert "other is being written by another process: wait until it ends" in run_wrongly(
            run, *learn, "--out", tmp_path / "other"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--method": "snapkv"}, "method 'snapkv' has quantizer=None: expected MinMax or Hadamard"),
        ({"--method": "minikv:group_size=32"}, "head_dim 16 is not divisible by group_size 32"),
        ({"--text": "/no/such/file"}, "No such file"),
        ({"--learn": "budgets"}, "learn='budgets': expected some of ranges, rotation"),
        ({"--limit": "50"}, "the text has 60 tokens: 50 windows of 90 need 4500"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, arguments: dict[str, str], message: str
):
    (tmp_path / "text.txt").write_text("a" * 60)
    options: dict[str, Any] = {"--method": "minikv", "--text": tmp_path / "text.txt", "--context": 80, "--queries": 10}
    options |= arguments
    given = [part for option in options.items() for part in option]
    command = ("calibrate", "--model", model_directory, "--out", tmp_path / "out")
    assert message in run_wrongly(run, *command, *given)
    assert not (tmp_path / "out").exists()
