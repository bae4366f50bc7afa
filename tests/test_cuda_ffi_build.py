"""What can be checked of the CUDA kernels without a GPU: they compile without spills, and bad libraries are named."""

from __future__ import annotations

import pathlib
import re

import pytest

from cuda_ffi import build, registration

try:
    build.find_nvcc()
    HAS_NVCC = True
except FileNotFoundError:
    HAS_NVCC = False

needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("name", ["decode_instances-128-2", "decode_attention", "quantize"])
def test_kernels_compile_without_spills(architecture: str, name: str, tmp_path: pathlib.Path) -> None:
    unit = next(u for u in build.units() if u.name == name)
    report = build.compile_unit(unit, (architecture,), tmp_path, report=True)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills
    assert set(spills) == {("0", "0")}


@needs_nvcc
def test_a_stale_library_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "units", lambda: ())
    library = build.build(("80",), library=tmp_path / "lib.so")
    assert registration.check_library(library) == ("80",)
    monkeypatch.setattr(build, "source_digest", lambda: "other")
    with pytest.raises(NotImplementedError, match=r"lib\.so is stale"):
        registration.check_library(library)


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
        (build.ARCHITECTURES, "10.0", False),
    ],
)
def test_a_foreign_architecture_is_named(architectures: tuple[str, ...], capability: str, fits: bool) -> None:
    library = pathlib.Path("lib.so")
    if fits:
        registration.check_architecture(architectures, capability, library)
    else:
        with pytest.raises(NotImplementedError, match=r"sm_|compute_capability"):
            registration.check_architecture(architectures, capability, library)
