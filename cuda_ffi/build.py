"""Builds the CUDA kernels: `python -m cuda_ffi.build [--arch 80,86,89,90a | all | native]`.

Drives `csrc/CMakeLists.txt`; needs nvcc and CMake. The library carries the digest of its sources and the list of its
architectures, so that `cuda_ffi.registration` recognises a stale or foreign one.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from cuda_ffi.library import ARCHITECTURES, BUILD_DIR, LIBRARY, SOURCE_DIR, architecture_of


def find_nvcc() -> str:
    """Finds nvcc on PATH or under CUDA_HOME.

    Raises:
      FileNotFoundError: if neither has one.
    """
    candidates = [shutil.which("nvcc"), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")]
    for candidate in candidates:
        if candidate and os.path.exists(candidate):
            return candidate
    raise FileNotFoundError("nvcc is neither on the path nor under CUDA_HOME: install the CUDA toolkit, 12.5 or newer")


def find_cmake() -> str:
    """Finds cmake on PATH.

    Raises:
      FileNotFoundError: if there is none.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise FileNotFoundError("cmake is not on the path: `pip install cmake ninja`, 3.25 or newer")
    return cmake


def native_architectures() -> tuple[str, ...]:
    """The architectures of this machine's GPUs, or all supported ones without a GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ARCHITECTURES
    architectures = {architecture_of(line.strip()) for line in text.splitlines() if line.strip()}
    return tuple(sorted(architectures))


def build(
    architectures: tuple[str, ...],
    *,
    jobs: int | None = None,
    directory: pathlib.Path = BUILD_DIR,
    targets: tuple[str, ...] = ("minikv_cuda",),
    report: bool = False,
) -> str:
    """Builds CMake targets in `directory`, by default the library.

    Args:
      architectures: some of `ARCHITECTURES`.
      jobs: parallel compilations; the number of cores by default.
      directory: for the library, and for objects in a folder per choice of architectures.
      targets: names in `csrc/CMakeLists.txt`.
      report: have the compiler print registers and spills of each kernel.

    Returns:
      The output of CMake and the compiler.

    Raises:
      FileNotFoundError: without nvcc or cmake.
      RuntimeError: if a compilation fails, with the compiler's message.
    """
    cmake, objects = find_cmake(), directory / f"objects-{'-'.join(architectures)}"
    objects.mkdir(parents=True, exist_ok=True)
    configure = [cmake, "-S", str(SOURCE_DIR), "-B", str(objects), *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{a}-real' for a in architectures)}"]
    configure += [f"-DMINIKV_REPORT={'ON' if report else 'OFF'}"]
    compile_target = [cmake, "--build", str(objects), "--target", *targets, "--parallel", str(jobs or os.cpu_count())]
    output = _run(configure) + _run(compile_target)
    if "minikv_cuda" in targets:
        # Renamed into place, so that a process that has the old library mapped keeps it.
        shutil.copy2(objects / LIBRARY.name, directory / f"{LIBRARY.name}.new")
        os.replace(directory / f"{LIBRARY.name}.new", directory / LIBRARY.name)
    return output


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


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
    build(architectures, jobs=options.jobs)
    sys.stdout.write(f"{LIBRARY} for {', '.join(architectures)}\n")


if __name__ == "__main__":
    main()
