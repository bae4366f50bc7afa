"""Runs `minikv` in the tests' process."""

from collections.abc import Callable

import pytest

from minikv_jax.cli.main import main

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Makes a function that runs `minikv` with its arguments and returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def run_wrongly(run: Run, *arguments: object) -> str:
    """Runs a wrong command, which must fail with exit code 2 and no stdout; returns its one-line error."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("minikv: error: ")
    assert err.count("\n") == 1
    return err
