"""Tests the structure of the code: sizes, signatures, private names, and the direction of imports."""

from __future__ import annotations

import ast
import inspect
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import cuda_ffi
import pallas_kernels

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "minikv_jax").rglob("*.py"))
KERNELS = sorted(path for package in ("pallas_kernels", "cuda_ffi") for path in (ROOT / package).rglob("*.py"))
CUDA = sorted(path for suffix in ("*.cu", "*.cuh", "*.h") for path in (ROOT / "cuda_ffi" / "csrc").rglob(suffix))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MODULE_LINES, CUDA_LINES, FUNCTION_LINES = 350, 450, 60
PARAMETERS, KERNEL_PARAMETERS = 10, 8


def functions(path: pathlib.Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def place(path: pathlib.Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def parameters(node: ast.FunctionDef) -> int:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize(("paths", "limit"), [(LIBRARY, MODULE_LINES), (CUDA, CUDA_LINES)], ids=["python", "cuda"])
def test_files_are_short(paths: list[pathlib.Path], limit: int) -> None:
    assert paths
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > limit} == {}


def test_functions_are_short() -> None:
    assert [
        place(path, node)
        for path in LIBRARY
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= FUNCTION_LINES
    ] == []


def test_signatures_are_short() -> None:
    assert [
        place(path, node) for path in (*LIBRARY, *KERNELS) for node in functions(path) if parameters(node) > PARAMETERS
    ] == []


@pytest.mark.parametrize("package", [cuda_ffi, pallas_kernels], ids=lambda package: package.__name__)
def test_kernel_entries_take_few_parameters(package: object) -> None:
    entries = {name: getattr(package, name) for name in package.__all__}  # pyright: ignore[reportAttributeAccessIssue]
    counts = {name: len(inspect.signature(f).parameters) for name, f in entries.items() if inspect.isfunction(f)}
    assert {name: count for name, count in counts.items() if count > KERNEL_PARAMETERS} == {}


def test_private_names_stay_in_their_module() -> None:
    """Neither the library nor its tests use `from module import _name` or `module._name`."""
    taken = []
    for path in (*LIBRARY, *KERNELS, *TESTS):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = [
            node
            for node in imports
            if (node.module or "").split(".")[0] in ("minikv_jax", "pallas_kernels", "cuda_ffi")
        ]
        taken += [place(path, node) for node in own for alias in node.names if is_private(alias.name)]
        modules = {alias.asname or alias.name for node in own for alias in node.names}
        taken += [
            place(path, node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ]
    assert taken == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_the_picture_is_that_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "docs" / "draw_architecture.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def lint_imports(directory: pathlib.Path) -> subprocess.CompletedProcess[str]:
    # Without the import hook of an editable installation, which would find this tree's packages instead.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen_importlib")]
sys.path.insert(0, ".")
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True))
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_an_upward_import_breaks_the_contract(tmp_path: pathlib.Path) -> None:
    for package in ("minikv_jax", "pallas_kernels", "cuda_ffi"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.json", "build", "csrc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    with open(tmp_path / "minikv_jax" / "packing.py", "a", encoding="utf-8") as file:
        file.write("\nfrom minikv_jax.ops import select\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode != 0
    assert "minikv_jax.packing -> minikv_jax.ops.select" in broken.stdout
