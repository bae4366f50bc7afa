"""Tests `--mesh` and runs of several processes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.commands import Run, run_wrongly

from minikv_jax.cli.lost_process import LOST

MESH = ("--mesh", "data=4,model=2")


def test_generate_on_a_mesh_is_generate(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    command = ["generate", "--model", model_directory, "--prompt", "bb", "--max-new-tokens", "20", "--json"]
    assert run(*command, tmp_path / "one.json")[0] == 0
    code, _, err = run(*command, tmp_path / "mesh.json", *MESH)
    assert code == 0
    assert "one prompt on a mesh with data=4: it is run 4 times" in err
    one, mesh = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "mesh.json"))
    assert mesh["tokens"] == one["tokens"]
    assert mesh["cache"]["ratio"] == one["cache"]["ratio"]
    assert (one["cache"]["devices"], mesh["cache"]["devices"]) == (1, 8)


def test_memory_says_what_each_device_holds(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    command = [
        "memory",
        "--model",
        model_directory,
        "--prompt-len",
        "256",
        "--batch",
        "8",
        "--json",
        tmp_path / "m.json",
    ]
    code, out, _ = run(*command, *MESH)
    report = json.loads((tmp_path / "m.json").read_text())
    device = report["device"]
    assert code == 0
    assert f"each of the devices  {device['bytes']:,} bytes of cache" in out
    lengths = 4 * 8 * (1 + 2 * 2)  # of 8 rows: of each region of 2 layers, and of the rows
    assert device["bytes"] == (report["bytes"] - lengths) // 8 + lengths // 4
    assert report["weight_bytes"] / 2 <= device["weight_bytes"] < report["weight_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "rows=2"], "mesh axis 'rows': expected data or model"),
        (["--mesh", "data=2,data=2"], "expected sizes of axes such as data=2,model=4"),
        (["--mesh", "data=16"], "mesh data=16 needs 16 devices: there are 8 (cpu)"),
        (["--mesh", "model=4"], "mesh axis model=4: num_key_value_heads=2 cannot be split into 4 equal parts"),
        (["--process-id", "0"], "--num-processes and --process-id need --coordinator HOST:PORT"),
        (["--coordinator", "127.0.0.1:1"], "--coordinator 127.0.0.1:1: expected --mesh"),
        ([*MESH, "--coordinator", "127.0.0.1:1"], "--process-id None --num-processes None: expected both"),
        (
            [*MESH, "--coordinator", "127.0.0.1:1", "--process-id", "2", "--num-processes", "2"],
            "--process-id 2 --num-processes 2: expected both, the first below the second",
        ),
    ],
)
def test_wrong_devices_are_refused(run: Run, model_directory: pathlib.Path, options: list[str], message: str):
    assert message in run_wrongly(run, "generate", "--model", model_directory, "--prompt", "bb", *options)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["memory", "--prompt-len", "64", "--mesh", "rows=2"], "mesh axis 'rows': expected data or model"),
        (["memory", "--prompt-len", "64", "--mesh", "data=0"], "mesh axis data=0: expected a size of at least 1"),
        (["memory", "--prompt-len", "64", "--mesh", "data=2"], "1 rows on a mesh with data=2: expected a multiple"),
        (["bench", "generate", "--mesh", "foo"], "expected sizes of axes such as data=2,model=4"),
        (["bench", "generate", "--mesh", "data=2"], "1 rows on a mesh with data=2: expected a multiple"),
        (["bench", "generate", "--mesh", "model=4"], "num_key_value_heads=2 cannot be split into 4 equal parts"),
        (
            ["bench", "generate", "--mesh", "model=2", "--method", "huggingface-dynamic"],
            "--mesh model=2: not with huggingface-dynamic, which measures one device",
        ),
        (
            ["bench", "generate", "--mesh", "model=2", "--find", "batch", "--memory-gb", "1"],
            "--mesh model=2: not with --find batch, which measures one device",
        ),
    ],
)
def test_a_mesh_is_never_ignored(run: Run, model_directory: pathlib.Path, command: list[str], message: str):
    """Neither by commands that need no devices nor by what runs on one device."""
    sizes = ["--prompt-len", "16", "--max-new-tokens", "4"] if command[0] == "bench" else []
    assert message in run_wrongly(run, *command, "--model", model_directory, *sizes)


def test_evaluate_on_a_mesh(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    text = tmp_path / "text.txt"
    text.write_text("All is well that ends well, and a bird in the hand. " * 40)
    command = ["evaluate", "perplexity", "--model", model_directory, "--text", text, "--method", "minikv"]
    command += ["--context", "64", "--continuation", "16", "--limit", "4", "--batch", "4", "--json"]
    assert run(*command, tmp_path / "one.json")[0] == 0
    assert run(*command, tmp_path / "mesh.json", *MESH)[0] == 0
    one, mesh = (json.loads((tmp_path / name).read_text())["means"]["minikv"] for name in ("one.json", "mesh.json"))
    assert mesh["nll"] == pytest.approx(one["nll"], abs=1e-3)
    assert mesh["kl_to_full"] == pytest.approx(one["kl_to_full"], rel=0.05, abs=1e-4)
    command[command.index("--batch") + 1] = "3"
    assert "3 rows on a mesh with data=4: expected a multiple" in run_wrongly(run, *command, tmp_path / "x.json", *MESH)


def start(process: int, model: pathlib.Path, port: int, tokens: int, log: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts one of two processes with four devices each."""
    command = [sys.executable, "-m", "minikv_jax.cli.main", "generate", "--model", str(model), "--prompt", "bb", *MESH]
    command += ["--max-new-tokens", str(tokens), "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [*command, "--process-id", str(process)], stdout=out, stderr=err, env=os.environ | flags
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one_run(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    port = free_port()
    processes = [start(number, model_directory, port, 24, tmp_path / str(number)) for number in (1, 0)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    _, alone, _ = run("generate", "--model", model_directory, "--prompt", "bb", "--max-new-tokens", "24")
    first = (tmp_path / "0.out").read_text(errors="replace")
    assert first.partition("\n")[0] == alone.partition("\n")[0]  # the text
    assert "generated tokens  24" in first
    assert (tmp_path / "1.out").read_bytes() == b""


@pytest.mark.slow
def test_a_lost_process_ends_the_other_in_one_line(model_directory: pathlib.Path, tmp_path: pathlib.Path):
    port = free_port()
    lost, other = (start(number, model_directory, port, 900, tmp_path / str(number)) for number in (1, 0))
    deadline = time.monotonic() + 240
    while not (tmp_path / "0.out").stat().st_size and time.monotonic() < deadline:  # until it has begun to write
        time.sleep(0.2)
    lost.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert other.wait(timeout=120) != 0
    assert time.monotonic() - begin < 60
    lost.wait(timeout=10)
    while not (errors := (tmp_path / "0.err").read_text()) and time.monotonic() - begin < 60:
        time.sleep(0.1)  # the process that filters stderr ends last
    # Whether a sum over both processes or the heartbeat fails first, there is one line; a sum's line adds what failed.
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith(f"minikv: error: {LOST}")
