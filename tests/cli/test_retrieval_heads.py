"""Tests `minikv retrieval-heads`."""

import json
import pathlib

from support.commands import Run, run_wrongly

from minikv_jax.methods import lookup


def test_its_setting_goes_into_a_method(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("The lamp was lit at dusk and burned until the morning. " * 40)
    command = ("retrieval-heads", "--model", model_directory, "--haystack", text, "--context", 400, "--samples", 1)
    code, printed, err = run(*command, "--heads", 2, "--json", out)
    assert (code, err) == (0, "")
    setting = printed.splitlines()[0].split()[-1]
    heads = lookup.parse(f"snapkv:{setting}").retrieval_heads
    saved = json.loads(out.read_text())
    assert [tuple(pair) for pair in saved["retrieval_heads"]] == list(heads)
    assert saved["questions"] == 2
    assert "heads=1000: expected 1 to" in run_wrongly(run, *command, "--heads", 1000)
