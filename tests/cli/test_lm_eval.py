"""Tests `minikv lm-eval` on local tasks, without a network and without torch."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from support.commands import Run, run_wrongly
from support.harness_tasks import ANSWERS, CHOICES, write_task

import minikv_jax as mk
from minikv_jax.models.chat import first_turn
from minikv_jax.models.hub import load

TEXT = "The lamp was lit at dusk and burned until the morning, when the keeper put it out. "
WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
from minikv_jax.cli.main import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
try:
    import torch
except ModuleNotFoundError:
    sys.exit(code)
"""


@pytest.fixture
def tasks(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with two tasks of the harness over rows of our own."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    rows = [{"text": f"{TEXT}Lamp {i} is", "choices": [" red", " green", " old"], "answer": i % 3} for i in range(4)]
    write_task(directory, CHOICES, rows)
    write_task(directory, ANSWERS, [{"text": f"{TEXT}Lamp {i} is", "ending": "x"} for i in range(3)])
    return directory


def test_local_tasks_agree_with_direct_evaluation_and_need_no_torch(
    model_directory: pathlib.Path, tasks: pathlib.Path, tmp_path: pathlib.Path
):
    out = tmp_path / "out.json"
    command = ["lm-eval", "--model", model_directory, "--method", "full", "--method", "minikv", "--batch", 4]
    command += ["--tasks", "colours,endings", "--include-path", tasks, "--limit", 3, "--chat-template", "--json", out]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "| task | metric | full | minikv |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| colours", "acc"],
        ["| endings", "exact_match"],
    ]
    report = json.loads(out.read_text())
    assert report["tasks"]["n-samples"]["colours"] == {"original": 4, "effective": 3}
    assert report["versions"]["lm_eval"]
    model, tokenizer = load(model_directory)
    assert tokenizer is not None
    for method in ("full", "minikv"):
        prompts = [first_turn(tokenizer, f"{TEXT}Lamp {i} is") for i in range(3)]
        result = mk.generate(model, prompts, method=method, max_new_tokens=12)
        for tokens, length, sample in zip(
            np.asarray(result.tokens), np.asarray(result.lengths), report["samples"][method]["endings"], strict=True
        ):
            text = str(tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True))
            assert sample["filtered_resps"] == [text.split("\n")[0].split("Z")[0]]
        picked = [np.argmax([score for score, _ in s["filtered_resps"]]) for s in report["samples"][method]["colours"]]
        accuracy = np.mean([choice == i % 3 for i, choice in enumerate(picked)])
        assert report["results"][method]["colours"]["acc,none"] == pytest.approx(accuracy)
    scores = {name: s["colours"][0]["filtered_resps"][0][0] for name, s in report["samples"].items()}
    assert abs(scores["full"] - scores["minikv"]) > 0.01  # the first token is read from the compressed cache too


def test_wrong_options_are_named(run: Run, model_directory: pathlib.Path, tasks: pathlib.Path):
    command = ["lm-eval", "--model", model_directory, "--method", "full", "--include-path", tasks]
    error = run_wrongly(run, *command[:-1], tasks / "none", "--tasks", "colours")
    assert "none is not a directory of task files" in error
    assert "'full' is given twice" in run_wrongly(run, *command, "--method", "full", "--tasks", "colours")
    assert "expected a JSON object" in run_wrongly(run, *command, "--tasks", "colours", "--metadata", "4096")
    assert "methodx" in run_wrongly(run, *command, "--method", "methodx", "--tasks", "colours")
    (tasks / "odd.yaml").write_text(CHOICES.replace("colours", "odd") + "process_docs: !function nowhere.at_all\n")
    assert "package that is not installed" in run_wrongly(run, *command, "--tasks", "odd")


@pytest.mark.slow
def test_an_unknown_task_is_named(run: Run, model_directory: pathlib.Path, tasks: pathlib.Path):
    command = ["lm-eval", "--model", model_directory, "--method", "full", "--include-path", tasks]
    error = run_wrongly(run, *command, "--tasks", "colours,colors")
    assert f"task colors: the harness has none of this name, nor has {tasks}" in error
