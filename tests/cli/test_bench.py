"""Tests `minikv bench` and its suites."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from support.commands import Run, run_wrongly

from minikv_jax import bench
from minikv_jax.bench import timing

RESULTS = pathlib.Path(bench.__file__).parent / "results"


def test_generate_reports_a_run_that_fails(run: Run, shape: str, tmp_path: pathlib.Path):
    out = tmp_path / "out.json"
    sizes = ["--prompt-len", 70, "--max-new-tokens", 8, "--dtype", "float32"]
    options = ["--implementation", "cuda", "--method", "minikv", "--batch", "3", "--output", out]
    code, text, _ = run("bench", "generate", "--shape", shape, *sizes, *options)
    assert code == 1
    report = json.loads(out.read_text())
    assert report["command"].startswith("minikv bench generate --shape")
    assert report["device"] == jax.devices()[0].device_kind
    assert report["versions"]["jax"] == jax.__version__
    (row,) = report["results"]
    assert (row["method"], row["batch"], row["prompt_len"]) == ("minikv", 3, 70)
    assert "CUDA" in row["error"]  # the kernel is not available here
    assert row["error"] in text


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks so far, all of which run in this process."""

    def in_this_process(
        function: Callable[..., Any], *arguments: Any, environment: dict[str, str], seconds: float | None
    ) -> Any:
        assert seconds is None
        names.append(function.__name__)
        assert 0 < float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) < 1
        return function(*json.loads(json.dumps(arguments)))

    names: list[str] = []
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", in_this_process)
    return names


def test_generate_finds_and_measures(run: Run, shape: str, tmp_path: pathlib.Path, tasks: list[str]):
    out = tmp_path / "out.json"
    common = ["bench", "generate", "--shape", shape, "--prompt-len", "64", "--max-new-tokens", "4", "--method", "full"]
    code, text, _ = run(*common, "--find", "batch", "--memory-gb", 0.003, "--output", out)
    assert code == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["batch"] == row["found"]["size"] > 1
    assert row["predicted_bytes"] <= row["memory_limit_bytes"] == 3_000_000
    assert f"batch {row['batch']:4}" in text
    assert tasks == ["probe_device", "find_size", "measure_case"]
    assert "clocks" in row


def test_trace_writes_a_table_and_a_report(run: Run, shape: str, tmp_path: pathlib.Path, tasks: list[str]):
    out = tmp_path / "out.json"
    sizes = ["--prompt-len", 64, "--max-new-tokens", 8, "--dtype", "float32", "--layers", 1, "--steps", 4]
    code, text, _ = run("bench", "trace", "--shape", shape, *sizes, "--method", "full", "--output", out)
    assert code == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("minikv bench trace --shape")
    assert report["device"] == jax.devices()[0].device_kind
    assert report["versions"]["jax"] == jax.__version__
    (row,) = report["results"]
    assert (row["method"], row["layers"], row["prompt_len"], row["steps"]) == ("full", 1, 64, 4)
    assert {part["part"] for part in row["parts"]} >= {"attention", "norms and residuals", "logits"}
    assert all(kernel["us"] > 0 for part in row["parts"] for kernel in part["kernels"])
    assert row["clocks"] == timing.clocks() or row["clocks"]["power_w"] > 0
    assert tasks == ["probe_device", "measure"]
    assert text.startswith("full batch 1 prompt 64 + 8: decode step (mean of 2 to 5), ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "{shape}", "--layers", "99"], "layers=99: expected 1 to "),
        (["--model", "{model}", "--layers", "1"], "layers=1: a model with real weights runs as a whole"),
        (["--shape", "{shape}", "--method", "huggingface-static"], "huggingface-static"),
        (["--shape", "{shape}", "--method", "minkv"], "minkv"),
        (["--shape", "{shape}", "--method", "minikv:group_size=64"], "head_dim 32 is not divisible by group_size 64"),
        (["--shape", "{shape}", "--steps", "0"], "expected at least 1"),
        (["--shape", "{shape}", "--max-new-tokens", "8", "--steps", "9"], "--steps 9: expected at most 8"),
        (["--shape", "{shape}", "--implementation", "nosuch"], "implementation='nosuch'"),
    ],
)
def test_trace_refuses_bad_options(
    run: Run,
    options: list[str],
    message: str,
    shape: str,
    model_directory: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", None)  # nothing may start
    given = (option.format(shape=shape, model=model_directory) for option in options)
    assert message in run_wrongly(run, "bench", "trace", *given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "llama9"], "llama9"),
        (["--shape", "{bad}"], "not valid JSON"),
        (["--shape", "{shape}", "--method", "minkv"], "minkv"),
        (["--shape", "{shape}", "--method", "minikv:group_size=64"], "head_dim 32 is not divisible by group_size 64"),
        (["--shape", "{shape}", "--method", "minikv:k_bits=5"], "k_bits=5"),
        (["--shape", "{shape}", "--find", "batch"], "--memory-gb"),
        (["--shape", "{shape}", "--memory-gb", "-1"], "--memory-gb -1"),
        (["--shape", "{shape}", "--memory-gb", "1e-10"], "--memory-gb 1e-10"),
        (["--shape", "{shape}", "--memory-gb", "inf"], "--memory-gb: 'inf': expected a finite number"),
        (
            ["--shape", "{shape}", "--find", "batch", "--memory-gb", "1", "--method", "huggingface-static"],
            "Hugging Face",
        ),
        (["--shape", "{shape}", "--implementation", "nosuch"], "implementation='nosuch'"),
        (["--shape", "{shape}", "--prompt-len", "x"], "'x': expected an integer"),
        (["--shape", "{shape}", "--dtype", "int8"], "--dtype"),
        (["--shape", "llama2-7b", "--batch", "0"], "expected at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    run: Run, options: list[str], message: str, shape: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", None)  # nothing may start
    (tmp_path / "bad.json").write_text("{")
    given = (option.format(shape=shape, bad=tmp_path / "bad.json") for option in options)
    assert message in run_wrongly(run, "bench", "generate", *given)


def test_figures_and_table_show_what_was_measured(run: Run, tmp_path: pathlib.Path):
    measured = {"prefill_s": 1.0, "decode_ms": 2.0, "times_floor": 1.25, "peak_bytes": 10**9, "cache_bytes": 5 * 10**8}
    measured |= {"max_new_tokens": 10, "compile_s": {"prefill": 3.0, "decode": 1.6}}

    def row(method: str, batch: int, prompt: int) -> dict[str, Any]:
        sizes = {"shape": "llama-3.1-8b", "method": method, "batch": batch, "prompt_len": prompt}
        return sizes | measured | {"decode_tokens_per_s": batch / 0.002}

    rows = [row(method, *sizes) for method in ("minikv", "full") for sizes in ((1, 2048), (1, 4096), (4, 2048))]
    failed = {"method": "full", "batch": 8, "prompt_len": 64, "max_new_tokens": 10, "error": "out of memory: 9 GB"}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"device": "D", "results": [*rows, failed]}))
    code, out, _ = run("bench", "figures", file, "--out", tmp_path)
    assert code == 0
    assert "| `minikv` | 4 | 2,048 + 10 | 1.000 | 2.00 | 1.25 | 2,000 | 1.0 | 0.50 | 5 |\n" in out
    assert "| `full` | 8 | 64 + 10 | out of memory | | | | | | |\n" in out
    names = {"llama-3.1-8b-latency.png", "llama-3.1-8b-batches.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names


def test_figures_of_two_devices_are_refused(run: Run, tmp_path: pathlib.Path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps({"device": file.stem, "results": []}))
    error = run_wrongly(run, "bench", "figures", *files, "--out", tmp_path)
    assert "results of a, b: expected one device" in error


def test_figures_names_a_file_that_is_no_result(run: Run, tmp_path: pathlib.Path):
    whole = json.loads(next(RESULTS.glob("generate_*.json")).read_text())
    row = whole["results"][0]
    for content, message in (
        ("é".encode("latin-1"), "result.json is not UTF-8 text"),
        (b"{}", "result.json lacks device, results"),
        ({"device": 5, "results": []}, "result.json: device is 5; accepted: text"),
        ({"results": [row | {"batch": "1"}]}, "result.json, results[0]: batch is '1'; accepted: an integer"),
        (
            {"results": [row, row | {"decode_ms": -1}]},
            "result.json, results[1]: decode_ms is -1; accepted: more than 0",
        ),
        ({"results": [row | {"shape": None}]}, "result.json, results[0]: lacks shape: expected shape or model"),
        ({"results": [{"method": "full", "error": "x"}]}, "result.json, results[0] lacks batch, prompt_len, max_new"),
    ):
        text = content if isinstance(content, bytes) else json.dumps(whole | content).encode()
        (tmp_path / "result.json").write_bytes(text)
        assert message in run_wrongly(run, "bench", "figures", tmp_path / "result.json", "--out", tmp_path)


def test_kernels_needs_the_cuda_library(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cuda_ffi.why_unavailable", lambda: "no CUDA here")
    assert "no CUDA here" in run_wrongly(run, "bench", "kernels")


def test_kernels_writes_every_row(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    row = {"op": "quantize", "shape": "B1", "implementation": "cuda", "ms": 0.5}
    monkeypatch.setattr("cuda_ffi.why_unavailable", lambda: None)
    monkeypatch.setattr("minikv_jax.bench.kernels.new_report", lambda command: {"command": command, "results": []})
    monkeypatch.setattr("minikv_jax.bench.kernels.measure", lambda rates: iter([row]))
    code, text, _ = run("bench", "kernels", "--output", tmp_path / "out.json")
    assert code == 0
    assert text.split() == ["quantize", "B1", "cuda", "0.5000", "ms"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"command": "minikv bench kernels", "results": [row]}


def test_bench_without_a_suite_names_them(run: Run):
    code, _, err = run("bench", "speed")
    assert code == 2
    assert all(suite in err for suite in ("kernels", "generate", "devices", "figures"))
