"""Location, sources and architectures of the library of CUDA kernels."""

from __future__ import annotations

import hashlib
import pathlib

_PACKAGE_DIR = pathlib.Path(__file__).parent
SOURCE_DIR = _PACKAGE_DIR / "csrc"
BUILD_DIR = _PACKAGE_DIR / "build"
LIBRARY = BUILD_DIR / "libminikv_cuda.so"
ARCHITECTURES = ("80", "86", "89", "90a")


def source_digest() -> str:
    """Digest of all sources of the library; `csrc/CMakeLists.txt` computes the same."""
    paths = (path for pattern in ("*.cu", "*.cuh", "*.h", "CMakeLists.txt") for path in SOURCE_DIR.rglob(pattern))
    digests = {str(path.relative_to(SOURCE_DIR)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def architecture_of(compute_capability: str) -> str:
    """The architecture for a device's compute capability: `"9.0"` -> `"90a"`.

    Raises:
      NotImplementedError: for a device that the kernels are not built for.
    """
    name = compute_capability.replace(".", "")
    for architecture in ARCHITECTURES:
        if architecture.removesuffix("a") == name:
            return architecture
    raise NotImplementedError(f"compute_capability={compute_capability}: built for {', '.join(ARCHITECTURES)}")
