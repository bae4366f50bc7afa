"""Tests `minikv inspect`."""

import json
import pathlib

import numpy as np
import pytest
from support.commands import Run, run_wrongly


@pytest.fixture
def inspect(run: Run, tmp_path: pathlib.Path, model_directory: pathlib.Path) -> Run:
    """Returns a function that runs `minikv inspect` with a model and an output directory."""
    return lambda *arguments: run("inspect", "--model", model_directory, "--out", tmp_path / "out", *arguments)


def test_inspect_writes_pictures_a_page_and_the_arrays(inspect: Run, tmp_path: pathlib.Path):
    ids = [i % 90 for i in range(100)]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    methods = ("full", "minikv:tail.length=32")
    arguments = [part for method in methods for part in ("--method", method)]
    code, out, err = inspect("--tokens-file", tmp_path / "ids.json", "--max-new-tokens", 5, *arguments)
    assert (code, err) == (0, "")
    header, _, full, minikv, *paths = out.splitlines()
    assert header.startswith("| method | tokens kept | key error |")
    assert full.startswith("| full | 100.0% |  |  | 100.0% | 100.0% |")
    assert minikv.startswith("| minikv:tail.length=32 | 50.0% |")
    names = ["attention", "budgets", "errors", "kept-full", "kept-minikv-tail.length=32"]
    names.append("error-minikv-tail.length=32")
    pngs = [tmp_path / "out" / f"{name}.png" for name in names]
    page, arrays = tmp_path / "out" / "report.html", tmp_path / "out" / "arrays.npz"
    assert paths == [str(path) for path in (*pngs, page, arrays)]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in pngs)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(pngs)
    assert "http" not in text
    assert "minikv:tail.length=32, layer by layer" in text
    with np.load(arrays) as stored:
        kept = stored["minikv:tail.length=32/kept"]
        assert kept.shape == (2, 2, 100)
        assert (kept.sum(axis=-1) == 50).all()
        assert "full/key_error" not in stored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nosuch"), "method 'nosuch': expected one of"),
        (("--method", "minikv", "--method", "minikv"), "method 'minikv' is given twice"),
        (("--method", "minikv:group_size=32"), "head_dim 16 is not divisible by group_size 32"),
        (("--method", "full", "--max-new-tokens", "0"), "max_new_tokens=0: expected at least 1"),
        (("--method", "full", "--prompt-file", "/no/such/file"), "No such file"),
        (("--method", "full", "--out", __file__), "is a file: expected a directory"),
        (("--method", "full", "--implementation", "tpu"), "implementation='tpu': expected one of"),
        (("--method", "full", "--max-new-tokens", "1020"), "the prompt: 9 prompt + 1020 new tokens exceed"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    inspect: Run, tmp_path: pathlib.Path, arguments: tuple[str, ...], message: str
):
    prompt = () if "--prompt-file" in arguments else ("--prompt", "hello")
    assert message in run_wrongly(inspect, *prompt, *arguments)
    assert not (tmp_path / "out").exists()
