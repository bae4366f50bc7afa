"""Tests that a generation exported as StableHLO runs in a process without this library."""

import pathlib
import runpy
import subprocess
import sys

import numpy as np
from support.tiny import random_ids, tiny_model

from minikv_jax.generate import generate
from minikv_jax.models import hub

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "export_stablehlo.py"
PROGRAM = """
import sys
import jax
import numpy as np

program = jax.export.deserialize(bytearray(open("generate.bin", "rb").read()))
stored = np.load("generate.npz")
weights = [stored[f"arr_{number}"] for number in range(len(stored))]
tokens, lengths = program.call(weights, np.load("ids.npy"), np.array([64], np.int32))
assert not [name for name in sys.modules if name.startswith(("minikv_jax", "flax"))]
np.save("tokens.npy", tokens)
"""


def test_an_exported_generation_runs_without_the_library(tmp_path: pathlib.Path, monkeypatch, capsys):
    """It draws the tokens of `generate`, from the file and the weights alone."""
    model = tiny_model(head_dim=32, max_position_embeddings=128)
    hub.save(model, None, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "--model", "model", "--method", "minikv", "--max-new-tokens", "6"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.endswith("bytes for cpu, cuda\n")
    ids = random_ids((1, 64))
    np.save("ids.npy", np.asarray(ids))
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path)
    want = generate(model, ids, method="minikv", max_new_tokens=6).tokens
    np.testing.assert_array_equal(np.load("tokens.npy"), want)
