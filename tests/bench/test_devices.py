"""Tests the benchmark of all devices: its plan, its limit of time, and what it compares."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.bench import bench_case
from support.commands import Run, run_wrongly

from minikv_jax import files
from minikv_jax.bench import devices
from minikv_jax.bench.end_to_end import Case
from minikv_jax.bench.worker import TaskError


def test_plan_begins_with_the_baseline_and_the_largest_meshes():
    sizes = devices.Sizes(["a", "b"], ["c"], (1, 16), (32768,))
    steps = devices.plan(sizes, bench_case("a", prompt_len=2048), 8)
    assert [(cases[0].shape, cases[0].mesh) for cases in steps[:7]] == [
        *(("a", None), ("b", None), ("a", "model=8"), ("b", "model=8"), ("a", "data=8"), ("b", "data=8")),
        ("c", "model=8"),
    ]
    assert [cases[0].mesh for cases in steps[7::2]] == ["model=4", "data=4", "model=2", "data=2"]
    assert [(case.batch, case.prompt_len) for case in steps[2]] == [(1, 2048), (16, 2048), (1, 32768)]
    assert [(case.batch, case.prompt_len) for case in steps[4]] == [(8, 2048), (128, 2048)]
    assert [cases[0].mesh for cases in devices.plan(sizes, bench_case("a"), 1)] == [None, None]
    assert {cases[0].mesh for cases in devices.plan(sizes, bench_case("a"), 6)} >= {"model=6", "data=4", "model=2"}


def test_steps_share_the_time_that_is_left():
    shares = []

    def step(share: float) -> str:
        shares.append(share)
        return "done"

    steps = [devices.Step("first", 2, step), devices.Step("second", 1, step), devices.Step("third", 1, step)]
    rows = list(devices.run(steps, time.monotonic() + 8))
    assert shares == pytest.approx([8, 8, 8], abs=0.1)  # twice a half, and never more than there is
    shares.clear()
    list(devices.run([devices.Step("one", 1, step)] * 8, time.monotonic() + 8))
    assert shares[0] == pytest.approx(2, abs=0.1)
    shares.clear()
    list(devices.run(steps, time.monotonic() - 1))
    assert shares == [0, 0, 0]
    assert [row["step"] for row in rows] == ["first", "second", "third"]
    assert {row["outcome"] for row in rows} == {"done"}


def test_commands_end_in_time():
    assert devices.run_command(f"{sys.executable} -c 'raise SystemExit(3)'", 20) == "exit code 3"
    began = time.monotonic()
    assert devices.run_command("sh -c 'sleep 60 & sleep 60'", 0.3) == "stopped after 0 s"
    assert time.monotonic() - began < 10


def test_rows_of_a_mesh_are_held_against_one_device():
    case = bench_case("a", batch=4, prompt_len=40)

    def row(case: Case, ms: float, **more: Any) -> dict[str, Any]:
        sizes = {name: value for name, value in dataclasses.asdict(case).items() if value is not None}
        return sizes | {"decode_ms": ms, "prefill_s": ms, "decode_tokens_per_s": case.batch / ms} | more

    rows = [row(case, 8.0), row(dataclasses.replace(case, batch=1), 5.0), row(case, 1.0, shape="b")]
    split = row(dataclasses.replace(case, mesh="model=4"), 2.0)
    gained = {"step_ratio": 0.25, "prefill_ratio": 0.25, "efficiency": 1.0}
    assert devices.compared(split, dataclasses.replace(case, mesh="model=4"), rows) == split | gained
    spread = dataclasses.replace(case, mesh="data=4")
    gained = {"step_ratio": 2.0, "prefill_ratio": 2.0, "efficiency": 0.5}
    assert devices.compared(row(spread, 10.0), spread, rows) == row(spread, 10.0) | gained
    alone = dataclasses.replace(case, mesh="model=2", batch=3)
    assert devices.compared(row(alone, 1.0), alone, rows) == row(alone, 1.0)
    failed = {"error": "out of memory"}
    assert devices.compared(failed, spread, rows) == failed
    assert devices.compared(split, dataclasses.replace(case, mesh="model=4"), [row(case, 8.0, error="x")]) == split


def in_this_process(function: Callable[..., Any], *arguments: Any, environment: Any, seconds: float | None) -> Any:
    """Runs a task here, on a machine of two devices, where data=2 takes too long."""
    del environment, seconds
    if function.__name__ == "compile_case":
        return {}
    values = json.loads(json.dumps(arguments))
    if function.__name__ == "measure_cases" and values[0][0]["mesh"] == "data=2":
        raise TaskError("stopped after 5 s")
    result = function(*values)
    return result | {"devices": 2} if function.__name__ == "probe_device" else result


@pytest.mark.slow
def test_what_no_step_finishes_is_a_row(run: Run, shape: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", in_this_process)
    out = tmp_path / "out.json"
    sizes = ["--batch", 1, "--long-prompt", 90, "--prompt-len", 40, "--max-new-tokens", 20, "--steps", 2]
    code, text, _ = run("bench", "devices", "--shape", shape, *sizes, "--dtype", "float32", "--output", out)
    assert code == 0
    assert "2 devices, at most 520 s in all" in text
    report = json.loads(out.read_text())
    assert (report["devices"], report["limit_s"]) == (2, 520)
    found = [(row.get("mesh"), row["batch"], row["prompt_len"], row.get("error")) for row in report["results"]]
    assert found == [
        *((None, 1, 40, None), (None, 1, 90, None), ("model=2", 1, 40, None), ("model=2", 1, 90, None)),
        ("data=2", 2, 40, "stopped after 5 s"),
    ]
    assert "between devices" in [part["part"] for part in report["traces"][0]["parts"]]
    one, split = report["results"][1], report["results"][3]
    assert split["step_ratio"] == split["decode_ms"] / one["decode_ms"]
    assert split["efficiency"] == pytest.approx(split["decode_tokens_per_s"] / one["decode_tokens_per_s"] / 2)
    assert [step["outcome"] for step in report["steps"]] == [
        "done",
        "2 of 2 rows",
        "2 of 2 rows",
        "0 of 1 rows",
        "done",
    ]


def test_a_value_that_the_model_refuses_is_a_row_of_every_step(
    run: Run, shape: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def every_task(function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        compiles = function.__name__ == "compile_case"
        return function(*arguments) if compiles else in_this_process(function, *arguments, **how)

    monkeypatch.setattr("minikv_jax.bench.generate.run_task", every_task)
    out = tmp_path / "out.json"
    sizes = ["--batch", 1, "--long-prompt", 90, "--prompt-len", 40, "--max-new-tokens", 20, "--dtype", "float32"]
    code, _, _ = run("bench", "devices", "--shape", shape, *sizes, "--method", "minikv:group_size=64", "--output", out)
    assert code == 1
    report = json.loads(out.read_text())
    rows = [*report["results"], *report["traces"]]
    assert [row.get("mesh") for row in rows] == [None, None, "model=2", "model=2", "data=2", "model=2"]
    refused = "head_dim 32 is not divisible by group_size 64"
    assert all(refused in row["error"] for row in rows if row.get("mesh") != "data=2")
    outcomes = [step["outcome"] for step in report["steps"]]
    assert outcomes[:4] == ["done", "0 of 2 rows", "0 of 2 rows", "0 of 1 rows"]
    assert refused in outcomes[4]


def test_a_size_that_fails_stops_no_other(shape: str, tmp_path: pathlib.Path):
    """CUDA kernels cannot run here."""
    cases = [bench_case(shape, prompt_len=40, batch=batch, implementation="cuda") for batch in (1, 2)]
    (tmp_path / "log").touch()
    devices.measure_cases([dataclasses.asdict(case) for case in cases], str(tmp_path / "log"))
    assert ["CUDA" in row["error"] for _, row in files.read_log(tmp_path / "log")[0]] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "llama9"], "llama9"),
        (["--method", "minkv"], "minkv"),
        (["--limit", "0"], "expected at least 1"),
        (["--implementation", "nosuch"], "implementation='nosuch'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    run: Run, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", None)  # nothing may start
    assert message in run_wrongly(run, "bench", "devices", *options)


def test_heads_that_do_not_divide_are_refused_before_a_step(run: Run, shape: str, monkeypatch: pytest.MonkeyPatch):
    about = {"device": "D", "devices": 8, "memory_bytes": None, "read_bytes_per_s": None}
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", lambda *_, **__: about)
    assert "mesh axis model=8: num_key_value_heads=2 cannot be split into 8 equal parts" in run_wrongly(
        run, "bench", "devices", "--shape", shape
    )
