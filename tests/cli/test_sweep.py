"""`minikv sweep`: what it writes, and how it resumes."""

import csv
import itertools
import json
import pathlib
from typing import Any

import pytest
from support.commands import Run, run_wrongly

from minikv_jax.evaluation import run as run_module

PNG = b"\x89PNG\r\n\x1a\n"
GRID = ("--method", "h2o", "--method", "minikv:tail.length=32", "--sweep", "heavy=0.1,0.2", "--sweep", "recent=0.1")


@pytest.fixture
def sweep(run: Run, tmp_path: pathlib.Path, model_directory: pathlib.Path) -> Run:
    """Runs `minikv sweep cases ... --out NAME` on two cases: exit code, stdout, stderr."""
    rows = [{"prompt_ids": [i % 90 for i in range(n, 3 * n)], "continuation_ids": [7, 8, 9]} for n in (35, 36)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sweep(out: str, *arguments: object) -> tuple[int, str, str]:
        command = ["sweep", "cases", "--data", tmp_path / "cases.jsonl", "--model", model_directory]
        return run(*command, "--out", tmp_path / out, *arguments)

    return sweep


def test_what_a_sweep_writes(sweep: Run, tmp_path: pathlib.Path):
    code, text, log = sweep("out", *GRID, "--method", "kivi-2", "--set", "tail.length=64")
    assert code == 0, log
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = [f"{name}heavy={heavy},recent=0.1" for name in ("h2o:", "minikv:tail.length=32,") for heavy in (0.1, 0.2)]
    assert list(results["points"]) == labels
    tails = [point["fields"]["tail"]["length"] for point in results["points"].values()]
    assert tails == [64, 64, 32, 32]  # a method's own setting wins over --set
    assert list(results["skipped"]) == ["kivi-2:heavy=0.1,recent=0.1", "kivi-2:heavy=0.2,recent=0.1"]
    assert "needs a scorer" in log
    for label, point in results["points"].items():
        rows = [case["points"][label] for case in results["cases"]]
        assert point["means"]["kl_to_full"] == pytest.approx(sum(row["kl_to_full"] for row in rows) / 2)
        assert f"| {label} |" in text
    with (tmp_path / "out" / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["point"] for row in table] == labels
    assert [row["heavy"] for row in table] == ["0.1", "0.2"] * 2
    assert [float(row["nll"]) for row in table] == [point["means"]["nll"] for point in results["points"].values()]
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(PNG)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(label in page for label in labels)
    assert "needs a scorer" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere


def test_a_killed_sweep_goes_on(sweep: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert sweep("whole", *GRID, "--no-figures")[0] == 0
    original = run_module.measure_each

    def killed(model: Any, cases: Any, methods: Any, *rest: Any) -> Any:
        """The first case's methods, and half of the second's."""
        measured = original(model, cases, methods, *rest)
        if cases[0].name == "line 1":
            yield from measured
        else:
            yield from itertools.islice(measured, 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "measure_each", killed)
    assert sweep("killed", *GRID, "--no-figures")[0] == 130
    rows = tmp_path / "killed" / "rows.jsonl"
    with rows.open("a") as stream:
        stream.write('{"case": "line 2", "po')  # torn by the kill
    assert not (tmp_path / "killed" / "results.json").exists()

    seen = []

    def watched(model: Any, cases: Any, methods: Any, *rest: Any) -> Any:
        seen.append((cases[0].name, len(methods)))
        return original(model, cases, methods, *rest)

    monkeypatch.setattr(run_module, "measure_each", watched)
    assert sweep("killed", *GRID, "--no-figures")[0] == 0
    assert seen == [("line 2", 2)]
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert len(rows.read_text().splitlines()) == 2 * 4

    assert sweep("killed", *GRID, "--method", "full:sinks=1", "--no-figures")[0] == 0  # heavy needs a scorer: skipped
    assert seen == [("line 2", 2)]
    assert sweep("killed", *GRID, "--method", "snapkv", "--no-figures")[0] == 0
    assert seen == [("line 2", 2), ("line 1", 2), ("line 2", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*GRID, "--sweep", "heavy=0.3"), "--sweep names a field twice"),
        ((*GRID, "--sweep", "group"), "expected KEY=VALUE"),
        (("--method", "h2o", "--method", "h2o"), "a point of the sweep is given twice: h2o, h2o"),
        (
            ("--method", "h2o", "--sweep", "nosuch=1"),
            "no point of the sweep can be measured: method 'h2o': unknown setting 'nosuch'",
        ),
        (("--method", "h2o", "--budget-bytes", "0.01"), "'h2o' does not fit 1.00%"),
    ],
)
def test_a_wrong_sweep_is_one_line_and_exit_code_2(sweep: Run, arguments: tuple[str, ...], message: str):
    assert message in run_wrongly(sweep, "out", *arguments)


def test_another_sweeps_directory_is_refused(sweep: Run, tmp_path: pathlib.Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps({"description": {"task": "needle"}, "points": {}}))
    code, _, err = sweep("out", *GRID)
    assert code == 2
    assert "holds another sweep: task, options, model" in err
