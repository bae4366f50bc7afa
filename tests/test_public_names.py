"""Tests the public names: imported on first use, and independent of earlier imports."""

import pathlib
import subprocess
import sys
import types

import pytest

import minikv_jax

PACKAGE = pathlib.Path(minikv_jax.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


GENERATE_IS_CALLABLE = """
import minikv_jax
assert callable(minikv_jax.generate)
from minikv_jax import generate
assert callable(generate)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_no_jax():
    loaded = run("import minikv_jax, sys; minikv_jax.__version__; print(*sys.modules)").split()
    assert not {"jax", "numpy", "transformers"} & set(loaded)


def test_every_public_name_is_there():
    assert {"generate", "Method", "KVCache", "decode_attention", "load", "__version__"} <= set(dir(minikv_jax))
    for name in dir(minikv_jax):
        assert getattr(minikv_jax, name) is not None or name.startswith("_")
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        _ = minikv_jax.nosuch  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["memory", "lookup"])
def test_a_public_module_may_be_the_first_name_that_is_used(name: str):
    run(f"import minikv_jax, types; assert isinstance(minikv_jax.{name}, types.ModuleType)")


@pytest.mark.parametrize(
    "first",
    [
        "import minikv_jax",
        "import minikv_jax.generate",
        "from minikv_jax.generate import stream",
        "from minikv_jax import stream",
        "import minikv_jax; minikv_jax.generate; import minikv_jax.generate",
        "import minikv_jax; minikv_jax.memory",
    ],
)
def test_generate_is_the_function_whatever_is_imported_before(first: str):
    run(f"{first}\n{GENERATE_IS_CALLABLE}")


def test_public_names_can_be_replaced(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("stand_in")
    monkeypatch.setattr(minikv_jax, "generate", module)
    assert minikv_jax.generate is module


def test_a_name_of_the_librarys_own_is_protected_before_its_first_use():
    code = (
        "import minikv_jax as mk\n"
        "try:\n    mk.register_method(mk.Method(name='minikv'))\n"
        "except ValueError as error:\n    print(error)"
    )
    assert "is the library's own" in run(code)


# Imports slow packages once, then every module in a separate process.
FIRST_IMPORTS = """
import importlib, os, sys
import jax, flax.nnx, matplotlib.figure, orbax.checkpoint, transformers
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(module)
"""


def test_every_module_can_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_IMPORTS, *MODULES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
