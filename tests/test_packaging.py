"""Tests the shipped library: built and installed elsewhere, or run from a source tree."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from support.harness_tasks import CHOICES, write_task

from minikv_jax.cli.main import commands
from minikv_jax.models import hub

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("minikv_jax", "pallas_kernels", "cuda_ffi")

# Hides an installed minikv_jax, its metadata and the import hook of an editable installation, in every process that has
# this file's directory on its path.
SITECUSTOMIZE = """
import importlib.metadata, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
original = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.startswith("minikv"):
        raise importlib.metadata.PackageNotFoundError(name)
    return original(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""

# Runs `minikv` once per list of arguments, in one process.
RUN_ALL = """
import json, pathlib, sys
import minikv_jax
from minikv_jax.cli.main import main
assert pathlib.Path(minikv_jax.__file__).is_relative_to(sys.argv[1]), minikv_jax.__file__
for arguments in json.loads(sys.argv[2]):
    assert main(arguments) == 0, arguments
"""


def check(*command: object, cwd: pathlib.Path, **environment: str) -> str:
    """Runs a command that must succeed, and returns its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Builds the wheel from an sdist of a copy of the tree."""
    directory = tmp_path_factory.mktemp("build")
    hidden = shutil.ignore_patterns(".*cache", ".git", ".venv", "build", "dist", "__pycache__", "site", ".hypothesis")
    shutil.copytree(ROOT, directory / "tree", ignore=hidden)
    check(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory / "dist", "tree", cwd=directory)
    (path,) = (directory / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel: pathlib.Path):
    in_tree = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not {"__pycache__", "build"} & set(path.parts)
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree
    assert {f"{package}/py.typed" for package in PACKAGES} <= in_wheel


@pytest.mark.slow
def test_the_readmes_python_runs_from_the_wheel(wheel: pathlib.Path, tmp_path: pathlib.Path):
    """The environment shares the dependencies, but not the source tree."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    # A .pth file puts directories on the path without reading the .pth files in them: no editable installation is seen.
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(shared))
    install = ("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    check(sys.executable, "-m", "pip", *install, cwd=tmp_path)

    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "log.txt", tmp_path / "examples")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    code = "\n".join([*blocks, "print(minikv_jax.__version__, minikv_jax.__file__)"])
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    hub.demo_model_path()  # downloaded here, where pip is
    *lines, where = check(python, "readme.py", cwd=tmp_path).splitlines()
    version, file = where.split(" ", 1)
    assert version == wheel.name.split("-")[1]
    assert pathlib.Path(file).is_relative_to(site)
    printed = [line.strip() for line in lines if re.fullmatch(r"[\d,]+ prompt tokens in [\d,]+ bytes", line)]
    assert len(printed) == 1
    assert printed[0] in readme


@pytest.mark.slow
def test_every_command_runs_without_installation(model_directory: pathlib.Path, shape: str, tmp_path: pathlib.Path):
    """Commands run with the source tree on PYTHONPATH."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    text, cases = tmp_path / "text.txt", tmp_path / "cases.jsonl"
    text.write_text("The lamp was lit at dusk and burned until the morning. " * 8)
    cases.write_text(json.dumps({"prompt_ids": list(range(60)), "continuation_ids": [7, 8]}))
    book_file = tmp_path / "book.txt"
    book_file.write_text(text.read_text() * 5)
    model = ["--model", str(model_directory)]
    method = ["--method", "minikv:tail.length=32"]
    book = {"prompt": f"{text.read_text()}Why?", "answers": ["at dusk"]}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(book))
    write_task(tmp_path, CHOICES, [{"text": text.read_text(), "choices": [" red", " old"], "answer": 1}])
    harness = ["--tasks", "colours", "--include-path", str(tmp_path)]
    case_files = ["cases", "--data", str(cases), *model, *method]
    sizes = ["--prompt-len", "64", "--max-new-tokens", "4", "--dtype", "float32"]
    learning = ["--context", "80", "--queries", "10", "--limit", "1", "--steps", "2"]
    runs = {
        "bench": ["generate", "--shape", shape, *sizes, "--method", "full", "--output", "bench.json"],
        "calibrate": [*model, *method, "--text", str(text), *learning, "--out", "calibrated"],
        "evaluate": [*case_files, "--json", "evaluated.json"],
        "generate": [*model, *method, "--prompt", "The lamp", "--max-new-tokens", "4", "--json", "generated.json"],
        "inspect": [*model, *method, "--prompt-file", str(text), "--max-new-tokens", "2", "--out", "inspected"],
        "lm-eval": [*model, *method, *harness],
        "memory": ["--config", shape, "--prompt-len", "64", *method],
        "methods": [],
        "reproduce": ["kivi", *model, "--data", str(tmp_path), "--limit", "1", "--max-prompt", "90"],
        "retrieval-heads": [*model, "--heads", "1", "--haystack", str(book_file), "--context", "400", "--samples", "1"],
        "sweep": [*case_files, "--sweep", "heavy=0.1,0.2", "--no-figures", "--out", "swept"],
    }
    assert set(runs) == {command.name for command in commands()}
    arguments = json.dumps([[name, *rest] for name, rest in runs.items()])
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    check(sys.executable, "-c", RUN_ALL, ROOT, arguments, cwd=tmp_path, PYTHONPATH=path)
    assert "error" not in json.loads((tmp_path / "bench.json").read_text())["results"][0]


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = re.findall(r"^make [\w-]+$", script, re.MULTILINE)
    assert steps
    assert re.findall(r"- run: (make [\w-]+)", workflow) == steps
