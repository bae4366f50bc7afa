"""Fixtures shared by the test files."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from support import resources
from support.commands import Run, runner
from support.model_directory import write_model, write_shape
from transformers import PreTrainedTokenizerBase

from minikv_jax.methods.registry import REGISTRIES
from minikv_jax.models import hub
from minikv_jax.models.decoder import Llama

jax.config.update("jax_num_cpu_devices", 8)  # for the tests of meshes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need a GPU, so that the summary counts them."""
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make test-gpu)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Removes the components and methods that a test registers."""
    before = [(registry, registry.snapshot()) for registry in REGISTRIES]
    yield
    for registry, entries in before:
        registry.restore(entries)


@pytest.fixture(autouse=True, scope="module")
def _programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees a module's compiled programs, because each takes memory maps and a process may have some 65,000."""
    yield
    resources.note(request.module.__name__)
    jax.clear_caches()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends a worker's peaks to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["resources"] = resources.peaks()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receives a worker's peaks."""
    resources.add(node.gateway.id, getattr(node, "workeroutput", {}).get("resources"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the peak number of memory maps against the limit."""
    for line in resources.summary():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Llama, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 with its tokenizer; downloaded once, then cached."""
    model, tokenizer = hub.load(hub.DEMO_MODEL)
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Directory of a tiny random chat model for `minikv_jax.load`."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_model(directory)
    return directory


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny model's config.json."""
    return write_shape(tmp_path_factory.mktemp("shape") / "config.json")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Run:
    """Returns a function that runs `minikv` in this process; compiled programs go to the test's directory."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return runner(capsys)
