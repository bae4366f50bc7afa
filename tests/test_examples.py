import pathlib
import re
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run_example(name: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model), "--max-new-tokens", "5"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_generate_prints_both_rows_and_the_bytes(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("generate.py", model_directory, monkeypatch)
    assert "bytes of cache" in capsys.readouterr().out.splitlines()[-1]


def test_chat_appends_the_second_turn_to_the_first(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("chat.py", model_directory, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    first, second = [int(line.strip("[").split()[0]) for line in lines if "tokens seen" in line]
    assert first >= len("Name a city by the sea.")
    assert second >= first + len("What can I see there?")


def test_the_python_of_the_readme_runs(model_directory: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(code.replace("smollm2-135m-instruct", str(model_directory)), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith(" bytes")
