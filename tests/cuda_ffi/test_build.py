"""Tests the CUDA build without a GPU: kernels compile without spills, and bad libraries are named."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest

from cuda_ffi import build, library, registration

try:
    build.find_nvcc()
    build.find_cmake()
    WHY_NOT = ""
except FileNotFoundError as error:
    WHY_NOT = str(error)

needs_compiler = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@needs_compiler
@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path: pathlib.Path) -> None:
    """The hot kernels compile for an Ampere and a Hopper target."""
    targets = ("decode_128_2", "decode_128_4", "short_cache", "quantize", "append", "prefill_attention", "window_votes")
    report = build.build(("80", "90a"), directory=tmp_path, targets=targets, report=True)
    assert f"sources={library.source_digest()} architectures=80,90a" in report
    kernels = re.findall(r"for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report, re.DOTALL)
    assert {architecture for architecture, *_ in kernels} == {"sm_80", "sm_90a"}
    assert {tuple(spills) for _, *spills in kernels} == {("0", "0")}


@needs_compiler
def test_a_stale_library_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lib.so"
    info = f"sources={library.source_digest()} architectures=80,90a"
    command = [build.find_nvcc(), "-shared", "-Xcompiler", "-fPIC", f'-DMINIKV_BUILD_INFO="{info}"', "-o", str(path)]
    subprocess.run([*command, str(library.SOURCE_DIR / "common" / "build_info.cu")], check=True)
    assert registration.check_library(path) == ("80", "90a")
    monkeypatch.setattr(registration, "source_digest", lambda: "other")
    with pytest.raises(NotImplementedError, match=r"lib\.so is stale"):
        registration.check_library(path)


def test_without_a_compiler_the_build_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(FileNotFoundError, match="cmake"):
        build.build(("80",))
    with pytest.raises(FileNotFoundError, match="nvcc"):
        build.find_nvcc()


def test_a_missing_library_says_how_to_build_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotImplementedError, match=r"python -m cuda_ffi\.build"):
        registration.check_library(tmp_path / "none.so")


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (("80",), "8.0", True),
        (("80",), "8.9", True),
        (("86",), "8.0", False),
        (("90a",), "9.0", True),
        (("80",), "9.0", False),
        (("90a",), "8.6", False),
        (library.ARCHITECTURES, "10.0", False),
    ],
)
def test_a_foreign_architecture_is_named(architectures: tuple[str, ...], capability: str, fits: bool) -> None:
    path = pathlib.Path("lib.so")
    if fits:
        registration.check_architecture(architectures, capability, path)
    else:
        with pytest.raises(NotImplementedError, match=r"sm_|compute_capability"):
            registration.check_architecture(architectures, capability, path)
