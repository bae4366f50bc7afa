"""Builds the CUDA kernels with nvcc: `python -m cuda_ffi.build [--arch 80,86,89,90a | all | native]`.

Objects and the library go to `cuda_ffi/build/`. The library carries the digest of the sources and the list of
architectures it was built from, so that `cuda_ffi.registration` can tell a stale or foreign one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax

SOURCE_DIR = pathlib.Path(__file__).parent
BUILD_DIR = SOURCE_DIR / "build"
LIBRARY = BUILD_DIR / "libminikv_cuda.so"
ARCHITECTURES = ("80", "86", "89", "90a")
HEAD_DIMS = (64, 96, 128, 256)
KEY_BITS = (2, 4)
_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--diag-suppress=940,2473")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One compilation: a source and its macros. Big templates are cut into several units to compile in parallel."""

    source: str
    macros: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.source.removesuffix(".cu"), *(m.split("=")[1] for m in self.macros)])


def units() -> tuple[Unit, ...]:
    """Every compilation the library is linked from, the slowest first."""
    decode = [
        Unit("decode_instances.cu", (f"MINIKV_HEAD_DIM={h}", f"MINIKV_KEY_BITS={b}"))
        for h in HEAD_DIMS
        for b in KEY_BITS
    ]
    decode.sort(key=lambda unit: "256" not in unit.macros[0])
    others = [source.name for source in sorted(SOURCE_DIR.glob("*.cu"))]
    plain = [Unit(name) for name in others if name not in ("decode_instances.cu", "build_info.cu")]
    return (*decode, *plain)


def source_digest() -> str:
    """Digest of everything the library is compiled from."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str:
    """The nvcc on the path or under CUDA_HOME.

    Raises:
      FileNotFoundError: where there is none.
    """
    candidates = [shutil.which("nvcc"), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")]
    for candidate in candidates:
        if candidate and os.path.exists(candidate):
            return candidate
    raise FileNotFoundError("nvcc is neither on the path nor under CUDA_HOME: install the CUDA toolkit, 12.4 or newer")


def native_architectures() -> tuple[str, ...]:
    """The architecture of the GPU in this machine, or all of them where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ARCHITECTURES
    found = {architecture_of(line.strip()) for line in text.splitlines() if line.strip()}
    return tuple(sorted(found))


def architecture_of(compute_capability: str) -> str:
    """`"9.0"` -> `"90a"`.

    Raises:
      NotImplementedError: for a device none of the kernels are built for.
    """
    name = compute_capability.replace(".", "")
    for architecture in ARCHITECTURES:
        if architecture.removesuffix("a") == name:
            return architecture
    raise NotImplementedError(f"compute_capability={compute_capability}: built for {', '.join(ARCHITECTURES)}")


def compile_unit(unit: Unit, architectures: tuple[str, ...], directory: pathlib.Path, report: bool = False) -> str:
    """Compiles one unit to an object in `directory`, unless an object of the same inputs is there.

    Returns:
      The compiler's output (with `report`, registers and spills of every kernel).

    Raises:
      RuntimeError: with the compiler's message.
    """
    target = directory / f"{unit.name}-{_unit_digest(unit, architectures)}.o"
    if target.exists() and not report:
        return ""
    for old in directory.glob(f"{unit.name}-*.o"):
        old.unlink()
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [find_nvcc(), *_FLAGS, *generate, f"-isystem={jax.ffi.include_dir()}"]
    command += [f"-D{macro}" for macro in unit.macros]
    command += (["-Xptxas", "-v"] if report else []) + ["-c", str(SOURCE_DIR / unit.source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(architectures: tuple[str, ...], jobs: int | None = None, library: pathlib.Path = LIBRARY) -> pathlib.Path:
    """Builds the library for `architectures` and returns its path.

    Raises:
      FileNotFoundError: without nvcc.
      RuntimeError: when a compilation fails.
    """
    objects = library.parent / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(lambda unit: compile_unit(unit, architectures, objects), units()))
    paths = [objects / f"{unit.name}-{_unit_digest(unit, architectures)}.o" for unit in units()]
    info = f"sources={source_digest()} architectures={','.join(architectures)}"
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [find_nvcc(), *_FLAGS, *generate, f'-DMINIKV_BUILD_INFO="{info}"', "-shared"]
    command += ["-o", str(library) + ".new", str(SOURCE_DIR / "build_info.cu"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    os.replace(str(library) + ".new", library)  # a process that has the old one mapped keeps it
    return library


def _unit_digest(unit: Unit, architectures: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((unit, architectures, _FLAGS)).encode())
    digest.update((SOURCE_DIR / unit.source).read_bytes())
    for header in sorted(SOURCE_DIR.glob("*.cuh")) + sorted(SOURCE_DIR.glob("*.h")):
        digest.update(header.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the CUDA kernels.")
    parser.add_argument("--arch", default="native", help="some of 80,86,89,90a; or native (default), all")
    parser.add_argument("--jobs", type=int, default=None, help="parallel compilations (default: the number of cores)")
    options = parser.parse_args(arguments)
    if options.arch == "native":
        architectures = native_architectures()
    else:
        architectures = ARCHITECTURES if options.arch == "all" else tuple(options.arch.split(","))
    unknown = set(architectures) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"--arch {','.join(sorted(unknown))}: expected some of {', '.join(ARCHITECTURES)}")
    sys.stdout.write(f"{build(architectures, options.jobs)} for {', '.join(architectures)}\n")


if __name__ == "__main__":
    main()
