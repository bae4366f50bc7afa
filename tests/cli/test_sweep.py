"""Tests `minikv sweep`: its files, and how it resumes."""

import csv
import itertools
import json
import pathlib
import time
from typing import Any

import pytest
from support.commands import Run, run_wrongly
from support.full_disk import full_disk

import minikv_jax
from minikv_jax import files
from minikv_jax.evaluation import run as run_module

PNG = b"\x89PNG\r\n\x1a\n"
GRID = ("--method", "h2o", "--method", "minikv:tail.length=32", "--sweep", "heavy=0.1,0.2", "--sweep", "recent=0.1")


@pytest.fixture
def sweep(run: Run, tmp_path: pathlib.Path, model_directory: pathlib.Path) -> Run:
    """Returns a function that runs `minikv sweep cases` on two cases."""
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
    assert tails == [64, 64, 32, 32]  # a method's own setting takes precedence over --set
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
        """Measures the first case's methods and half of the second's, then fails."""
        measured = original(model, cases, methods, *rest)
        if cases[0].name == "line 1":
            yield from measured
        else:
            yield from itertools.islice(measured, 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "measure_each", killed)
    assert sweep("killed", *GRID, "--no-figures") == (130, "", "minikv: interrupted\n")
    rows = tmp_path / "killed" / "rows.jsonl"
    with rows.open("a") as stream:
        stream.write('{"case": "line 2", "po')  # torn by the kill
    assert not (tmp_path / "killed" / "results.json").exists()

    seen = []

    def watched(model: Any, cases: Any, methods: Any, *rest: Any) -> Any:
        seen.append((cases[0].name, len(methods)))
        return original(model, cases, methods, *rest)

    monkeypatch.setattr(run_module, "measure_each", watched)
    code, _, log = sweep("killed", *GRID, "--no-figures")
    assert (code, log) == (0, f"minikv: the last line of {rows} is not complete: its row is measured anew\n")
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


PLUGIN = """
import minikv_jax as mk

@mk.register_scorer("places")
def places(inputs):
    return inputs.k.sum(axis=3).swapaxes(1, 2).astype("float32") * {sign}

mk.register_method(mk.Method(name="mine", scorer=places, heavy=0.1, recent=0.1))
"""
METRICS = ("nll", "kl_to_full")


def points(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "results.json").read_text())["points"]


def test_rows_of_an_edited_plugin_are_measured_anew(sweep: Run, tmp_path: pathlib.Path):
    plugin, out = tmp_path / "mine.py", tmp_path / "out"
    plugin.write_text(PLUGIN.format(sign="1"))
    command = ("--method", "mine", "--method", "h2o:heavy=0.1,recent=0.1", "--plugin", plugin, "--no-figures")
    assert sweep("out", *command)[::2] == (0, "")
    old, rows = points(out), (out / "rows.jsonl").read_text().splitlines()
    assert sweep("out", *command)[::2] == (0, "")
    assert (out / "rows.jsonl").read_text().splitlines() == rows

    plugin.write_text(PLUGIN.format(sign="-1.0"))
    assert sweep("out", *command)[::2] == (0, "minikv: 2 rows of mine measured anew: mine.py has changed\n")
    new, new_rows = points(out), (out / "rows.jsonl").read_text().splitlines()
    assert [new["mine"]["means"][name] != old["mine"]["means"][name] for name in METRICS] == [True, True]
    assert new["h2o:heavy=0.1,recent=0.1"] == old["h2o:heavy=0.1,recent=0.1"]
    assert len(new_rows) == len(set(new_rows)) == 4
    assert set(new_rows) & set(rows) == {row for row in rows if '"point": "h2o' in row}
    assert sweep("fresh", *command)[::2] == (0, "")
    assert points(tmp_path / "fresh") == new


def test_rows_of_another_version_are_measured_anew(sweep: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    command = ("out", "--method", "h2o", "--no-figures")
    assert sweep(*command)[::2] == (0, "")
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    monkeypatch.setattr(run_module, "__version__", "9.9")
    log = sweep(*command)[2]
    assert log == f"minikv: 2 rows of h2o measured anew: minikv_jax was {minikv_jax.__version__} and is 9.9\n"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["versions"]["minikv_jax"] == "9.9"
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows


def test_a_full_disk_is_one_line_and_the_sweep_goes_on(
    sweep: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("--method", "h2o", "--method", "minikv:tail.length=32", "--no-figures")
    assert sweep("whole", *command)[0] == 0
    original, rows = run_module.measure_each, tmp_path / "out" / "rows.jsonl"

    def filling(*arguments: Any) -> Any:
        """The first method's row, and half of the second's."""
        measured = original(*arguments)
        yield next(measured)
        with full_disk(rows.stat().st_size + 50):
            yield next(measured)

    monkeypatch.setattr(run_module, "measure_each", filling)
    code, _, error = sweep("out", *command)
    assert (code, error) == (2, f"minikv: error: [Errno 27] File too large: '{rows}'\n")
    assert [row["point"] for _, row in files.read_jsonl(rows)] == ["h2o"]
    monkeypatch.setattr(run_module, "measure_each", original)
    assert sweep("out", *command)[::2] == (0, "")
    assert (tmp_path / "out" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


def test_another_process_is_refused(sweep: Run, tmp_path: pathlib.Path):
    out = tmp_path / "out"
    with files.locked(out, file=out / ".lock"):
        error = run_wrongly(sweep, "out", "--method", "h2o", "--no-figures", "--model", "not looked at")
    assert error == f"minikv: error: {out} is being written by another process: wait until it ends\n"


@pytest.fixture
def finished(sweep: Run, tmp_path: pathlib.Path) -> pathlib.Path:
    """Directory of a finished sweep with two rows."""
    assert sweep("out", "--method", "h2o", "--no-figures")[0] == 0
    return tmp_path / "out"


def test_a_foreign_or_damaged_directory_is_refused_before_the_model_loads(sweep: Run, finished: pathlib.Path):
    header, rows = finished / "sweep.json", finished / "rows.jsonl"
    first, second = rows.read_text().splitlines()
    good = {path: path.read_bytes() for path in (header, rows)}
    whole = json.loads(header.read_text())
    row = json.loads(first)
    wrong: list[tuple[pathlib.Path, object, str]] = [
        (header, "{", "sweep.json is not valid JSON"),
        (header, {"a": 1}, "sweep.json lacks description, points"),
        (header, whole | {"points": []}, "sweep.json: points is []; accepted: an object"),
        (header, {"points": {}}, "sweep.json lacks description"),
        (header, whole | {"points": {}}, "rows.jsonl, line 1: case 'line 1' of point 'h2o' is not of this sweep"),
        (header, "", "sweep.json is not valid JSON"),
        (rows, b"\xff\n", "rows.jsonl, line 1 is not UTF-8 text"),
        (rows, f"{first}\nnull\n", "rows.jsonl, line 2: expected a JSON object"),
        (rows, f"{first}\n{second[:-9]}\n{second}\n", "rows.jsonl, line 2 is not valid JSON"),
        (rows, f"{first}\n{first}\n", "rows.jsonl, line 2: case 'line 1' of point 'h2o' is there twice"),
        (rows, json.dumps(row | {"nll": "1"}) + "\n", "rows.jsonl, line 1: nll is '1'; accepted: a number"),
        (rows, json.dumps(row | {"nll": 1e999}) + "\n", "rows.jsonl, line 1: nll is inf; accepted: a finite number"),
        (rows, json.dumps(row | {"more": 1}) + "\n", "rows.jsonl, line 1: unknown keys 'more'"),
        (rows, '{"case": "line 1"}\n', "rows.jsonl, line 1 lacks point, finite, nll"),
        (rows, "[" * 9999 + "\n", "rows.jsonl, line 1 is not valid JSON"),
    ]
    for path, content, message in wrong:
        for kept, old in good.items():
            kept.write_bytes(old)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        began = time.process_time()
        assert message in run_wrongly(sweep, "out", "--method", "h2o", "--no-figures", "--model", "not looked at")
        assert time.process_time() - began < 1
    header.unlink()
    assert "rows.jsonl is there without sweep.json: it is no sweep's" in run_wrongly(sweep, "out", "--method", "h2o")


@pytest.mark.parametrize("where", ["description", "points"])
def test_another_sweeps_directory_is_refused(sweep: Run, finished: pathlib.Path, where: str):
    header = json.loads((finished / "sweep.json").read_text())
    if where == "description":
        header["description"] |= {"task": "needle", "dtype": "float16"}
    else:
        header["points"]["h2o"]["fields"]["sinks"] = 9
    (finished / "sweep.json").write_text(json.dumps(header))
    differs = "task, dtype" if where == "description" else "h2o"
    error = run_wrongly(sweep, "out", "--method", "h2o", "--no-figures")
    assert f"out holds another sweep: {differs} differ; give another directory" in error
