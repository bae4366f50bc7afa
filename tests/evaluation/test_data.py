"""Tests benchmark data from a local stand-in for the hub."""

import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from minikv_jax.cli.main import main
from minikv_jax.evaluation.data import locate

Hub = Callable[[dict[str, bytes]], list[tuple[str, list[str]]]]


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Returns a function that sets the files of every download, and gives a list of downloads (name, patterns)."""
    monkeypatch.setenv("MINIKV_CACHE_DIR", str(tmp_path / "cache"))
    calls: list[tuple[str, list[str]]] = []

    def serve(files: dict[str, bytes]) -> list[tuple[str, list[str]]]:
        snapshot = tmp_path / "hub" / "0123456789abcdef"
        for name, content in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(content)

        def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
            assert repo_type == "dataset"
            calls.append((name, allow_patterns))
            snapshot.mkdir(parents=True, exist_ok=True)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return serve


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return stream.getvalue()


def parquet(*rows: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), stream)
    return stream.getvalue()


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(part) for part in ("evaluate", *arguments)])
    return code, capsys.readouterr().err


def test_longbench_from_the_hubs_archive(
    hub: Hub,
    tmp_path: pathlib.Path,
    model_directory: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The archive leads to a report with the data set, its revision and the hash of its files."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    row = {"context": "a = 1\n", "input": "", "answers": ["b = 2"], "_id": "x"}
    calls = hub({"data.zip": archive({"data/lcc.jsonl": lines(row), "data/lcc_e.jsonl": lines(row), "README": b"?"})})
    prompts, report = tmp_path / "prompts.json", tmp_path / "report.json"
    prompts.write_text(json.dumps({"lcc": "{context}Next:\n"}))
    base = ("longbench", "--model", model_directory, "--data", "THUDM/LongBench", "--method", "full", "--context", 40)
    assert evaluate(capsys, *base, "--prompts", prompts, "--json", report) == (0, "")
    assert calls == [("THUDM/LongBench", ["data.zip", "*.jsonl", "dataset2prompt.json"])]
    options = json.loads(report.read_text())["options"]
    assert options["data"]["name"] == "THUDM--LongBench@0123456789ab"
    assert sorted(options["data"]["files"]) == ["lcc.jsonl", "lcc_e.jsonl"]
    assert options["prompts"]["name"] == "prompts.json"
    code, error = evaluate(capsys, *base)
    assert code == 2
    assert "lacks dataset2prompt.json: they come from the LongBench repository" in error


def test_parquet_becomes_lines_and_lines_stay(hub: Hub):
    solved = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(3)]
    hub(
        {
            "main/test-00000-of-00002.parquet": parquet(*solved[:1]),
            "main/test-00001-of-00002.parquet": parquet(*solved[1:2]),
            "main/train-00000-of-00001.parquet": parquet(*solved),
            "passkey.jsonl": lines({"id": 1}),
        }
    )
    directory = locate(pathlib.Path("openai/gsm8k"), ("main/*.parquet",))
    assert (directory / "test.jsonl").read_bytes() == lines(*solved[:2])
    assert (directory / "train.jsonl").read_bytes() == lines(*solved)
    assert (directory / "passkey.jsonl").read_bytes() == lines({"id": 1})
    (directory / "test.jsonl").write_text("kept")
    assert locate(pathlib.Path("openai/gsm8k"), ("main/*.parquet",)) == directory
    assert (directory / "test.jsonl").read_text() == "kept"  # not made again
    assert locate(directory, ()) == directory


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, r"the data set 'a/b' on the hub has none of data.zip, \*.jsonl"),
        ({"data.zip": b"PK, but not really"}, ValueError, "data.zip is not a zip archive"),
        ({"test-0-of-1.parquet": b"not Parquet either"}, ValueError, "parquet is not a Parquet file"),
    ],
)
def test_downloads_that_cannot_be_read(
    hub: Hub, tmp_path: pathlib.Path, files: dict[str, bytes], error: type[Exception], message: str
):
    hub(files)
    with pytest.raises(error, match=message):
        locate(pathlib.Path("a/b"), ("data.zip", "*.jsonl"))
    assert not list((tmp_path / "cache" / "datasets").iterdir())  # nothing unfinished remains


def test_without_a_network_the_error_says_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_directory: pathlib.Path
):
    def snapshot_download(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = ("gsm8k", "--model", model_directory, "--method", "full")
    code, error = evaluate(capsys, *base, "--data", "openai/gsm8k")
    assert code == 2
    assert "could not download 'openai/gsm8k'" in error
    assert "no route to host" in error
    assert "a local directory with main/*.parquet, test.jsonl, train.jsonl" in error
    code, error = evaluate(capsys, *base, "--data", "/no/such/place")
    assert code == 2
    assert "data '/no/such/place' is neither a directory nor a data set on the hub (OWNER/NAME)" in error
