"""Runs the example notebook from top to bottom."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.ipynb"

# In a separate process, because the notebook kernel warns, which is an error in this one.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def printed(notebook: dict[str, Any]) -> str:
    """Returns the printed output of the cells."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def byte_counts(notebook: dict[str, Any]) -> list[str]:
    return re.findall(r"[\d,]+ bytes", printed(notebook))


def test_the_notebook_is_committed_with_its_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 200_000
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(byte_counts(notebook)) == 7


@pytest.mark.slow
def test_the_notebook_runs_and_prints_the_same_bytes(tmp_path: pathlib.Path):
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(NOTEBOOK.parent), str(executed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    committed, now = (json.loads(path.read_text(encoding="utf-8")) for path in (NOTEBOOK, executed))
    assert byte_counts(now) == byte_counts(committed)
    pictures = [
        output for cell in now["cells"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
