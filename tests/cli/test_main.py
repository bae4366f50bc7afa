"""Tests the command line as a whole: commands, help, errors."""

import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from support.commands import Run, run_wrongly

import minikv_jax
from minikv_jax.cli.main import commands, main


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def test_help_names_every_command_without_jax():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_python("-m", "minikv_jax.cli.main", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not result.stderr
    for command in commands():
        assert command.name in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    imported = run_python("-X", "importtime", "-m", "minikv_jax.cli.main", "--help").stderr
    assert "argparse\n" in imported
    assert not re.search(r"\| *(jax|numpy)\n", imported)


def test_every_file_of_a_command_is_one():
    names = {command.name for command in commands()}
    own = {"bench", "calibrate", "evaluate", "generate", "inspect", "memory", "methods", "sweep"}
    assert names == own | {"lm-eval", "reproduce", "retrieval-heads"}


def test_a_command_is_a_file(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """Only the file of the given command is imported."""
    (tmp_path / "main.py").touch()
    (tmp_path / "helper.py").write_text('"""Helps `minikv greet`: no command."""')
    (tmp_path / "broken.py").write_text('"""`minikv broken`: fail."""\nraise AssertionError')
    (tmp_path / "greet.py").write_text(
        '"""`minikv greet`: say hello to somebody.\n\nAnd no more."""\n'
        "def add_arguments(parser):\n    parser.add_argument('name')\n"
        "def run(arguments):\n    print('hello', arguments.name)\n    return 3\n"
    )
    monkeypatch.setattr("minikv_jax.cli.main.__file__", str(tmp_path / "main.py"))
    monkeypatch.setattr("minikv_jax.cli.__path__", [str(tmp_path)])
    assert [(command.name, command.summary) for command in commands()] == [
        ("broken", "fail"),
        ("greet", "say hello to somebody"),
    ]
    assert run("greet", "you") == (3, "hello you\n", "")


def test_version(run: Run):
    assert run("--version") == (0, f"minikv {minikv_jax.__version__}\n", "")


@pytest.mark.parametrize("command", [command.name for command in commands()])
def test_every_command_has_help(run: Run, command: str):
    code, text, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert text.startswith(f"usage: minikv {command}")


def test_user_error_is_one_line_and_exit_code_2(run: Run):
    assert "COMMAND" in run_wrongly(run)
    assert "invalid choice: 'nosuch'" in run_wrongly(run, "nosuch")


def test_output_that_cannot_be_written_is_one_line_and_exit_code_2(shape: str):
    """This happens with a shell's `> FILE` on a full disk."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minikv_jax.cli.main", "memory", "--config", shape, "--prompt-len", "64"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "minikv: error: [Errno 28] No space left on device\n")


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Lets Ctrl-C interrupt this process, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_ctrl_c_is_one_line_and_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch):
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    class Collected:
        def __del__(self) -> None:
            raise KeyboardInterrupt  # which Python drops

    def interrupted_while_collecting(arguments: object) -> int:
        Collected()
        threading.Event().wait(10)
        return 0

    began = time.monotonic()
    for command in (interrupted, interrupted_while_collecting):
        monkeypatch.setattr("minikv_jax.cli.methods.run", command)
        assert run("methods") == (130, "", "minikv: interrupted\n")
    assert time.monotonic() - began < 9  # the wait is cut short


def test_verbose_shows_where_an_error_comes_from(model_directory: pathlib.Path):
    with pytest.raises(ValueError, match="prompt is empty"):
        main(["generate", "--model", str(model_directory), "--prompt", "", "--verbose"])
