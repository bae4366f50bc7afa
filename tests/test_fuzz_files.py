"""Fuzzes the files of evaluation, caches and calibrations: read correctly, or refused in one line."""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import random
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from support import writers
from support.damage import Format, damage, mutate
from support.model_directory import byte_tokenizer
from support.tiny import tiny_config

import minikv_jax as mk
from minikv_jax import bench, files
from minikv_jax.bench import figures
from minikv_jax.cli import prompt
from minikv_jax.evaluation import sweep_store
from minikv_jax.evaluation.data import locate
from minikv_jax.evaluation.tasks.cases import Cases
from minikv_jax.evaluation.tasks.gsm8k import GSM8K
from minikv_jax.evaluation.tasks.infinitebench import InfiniteBench
from minikv_jax.evaluation.tasks.longbench import LongBench
from minikv_jax.methods import calibrated, lookup

TOKENIZER = byte_tokenizer()
LONGEST_SECONDS, LONGEST_CPU_SECONDS = 5.0, 1.0


class Kind(NamedTuple):
    """A kind of file: how to make one, how to read it, and its format.

    Attributes:
      make: writes a valid file and its dependencies to a directory, and returns its path.
      read: reads the directory; raises the error that a user sees.
      format: format of the JSON object, or of each line; None for bytes.
    """

    make: Callable[[pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path], Any]
    format: Format | None = None


# Task rows and templates ----------------------------------------------------------------------------------------------


def lines(path: pathlib.Path, *rows: Any) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cases_of_ids(directory: pathlib.Path) -> pathlib.Path:
    return lines(directory / "cases.jsonl", *[{"prompt_ids": [1, 2, 3], "continuation_ids": [4, 5]}] * 3)


def cases_of_text(directory: pathlib.Path) -> pathlib.Path:
    return lines(directory / "cases.jsonl", *[{"prompt": "Hello", "continuation": " you"}] * 3)


def read_cases(directory: pathlib.Path) -> None:
    make_cases(Cases(data=directory / "cases.jsonl"))


def make_cases(task: Any) -> None:
    """Makes the cases of a task with accepted rows: only needs of tokenizer or model may be refused."""
    try:
        task.cases(TOKENIZER, 4096)
    except ValueError as error:
        if not any(text in str(error) for text in ("exceed the model's", "leave no room", "has no tokens")):
            raise AssertionError(f"refused after the model was loaded: {error}") from error


LONGBENCH_ROW = {
    "context": "A long text.",
    "input": "Why?",
    "answers": ["so", "the reason"],
    "all_classes": ["so", "no"],
}
LONGBENCH_ROW |= {"length": 3, "dataset": "trec", "language": "en", "_id": "a"}


def longbench(directory: pathlib.Path) -> pathlib.Path:
    templates = {"qasper": "Read: {context}\nQ: {input}\nA:", "trec": "{context}\n{input}"}
    (directory / "dataset2prompt.json").write_text(json.dumps(templates))
    return lines(directory / "trec.jsonl", LONGBENCH_ROW, LONGBENCH_ROW | {"_id": "b"})


def longbench_templates(directory: pathlib.Path) -> pathlib.Path:
    longbench(directory)
    return directory / "dataset2prompt.json"


def read_longbench(directory: pathlib.Path) -> None:
    make_cases(LongBench(data=directory))


def whole_prompts(directory: pathlib.Path) -> pathlib.Path:
    return lines(directory / "lcc.jsonl", *[{"prompt": "a = 1\n", "answers": ["b = 2"], "id": n} for n in range(3)])


INFINITEBENCH_ROW = {
    "id": 1,
    "context": "A book.",
    "input": "Who?",
    "answer": ["Bob"],
    "options": ["A", "Bob", "C", "D"],
}


def infinitebench(directory: pathlib.Path) -> pathlib.Path:
    templates = {"longbook_choice_eng": "{context} {question} {OPTION_A} {OPTION_B}"}
    (directory / "prompts.json").write_text(json.dumps(templates))
    return lines(directory / "longbook_choice_eng.jsonl", INFINITEBENCH_ROW, INFINITEBENCH_ROW | {"id": 2})


def infinitebench_templates(directory: pathlib.Path) -> pathlib.Path:
    infinitebench(directory)
    return directory / "prompts.json"


def read_infinitebench(directory: pathlib.Path) -> None:
    make_cases(InfiniteBench(data=directory, datasets=("longbook_choice_eng",)))


def gsm8k(directory: pathlib.Path) -> pathlib.Path:
    row = {"question": "1+1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}
    lines(directory / "train.jsonl", row)
    return lines(directory / "test.jsonl", row, row)


def read_gsm8k(directory: pathlib.Path) -> None:
    make_cases(GSM8K(data=directory, shots=1))


def token_ids(directory: pathlib.Path) -> pathlib.Path:
    path = directory / "ids.json"
    path.write_text(json.dumps(list(range(50))))
    return path


def read_token_ids(directory: pathlib.Path) -> None:
    prompt.read(argparse.Namespace(tokens_file=directory / "ids.json"))


# Caches, calibrations, sweeps, results --------------------------------------------------------------------------------


def saved(directory: pathlib.Path, once: pathlib.Path, save: Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """Copies the files of `save`, which runs only once."""
    if not once.exists():
        save(once)
    shutil.copytree(once, directory / "saved")
    return directory / "saved"


def cache(directory: pathlib.Path) -> pathlib.Path:
    once = directory.parent / "cache"
    return saved(directory, once, lambda path: mk.save_cache(writers.cache(), path)) / "cache.json"


def cache_arrays(directory: pathlib.Path) -> pathlib.Path:
    paths = sorted(path for path in cache(directory).parent.joinpath("arrays").rglob("*") if path.is_file())
    return random.Random(directory.name).choice(paths)


def read_cache(directory: pathlib.Path) -> None:
    mk.restore_cache(directory / "saved", tiny_config())


def calibration(directory: pathlib.Path) -> pathlib.Path:
    def save(path: pathlib.Path) -> None:
        details = {"curve": [1.0, 0.5], "settings": {"steps": 2}}
        calibrated.save(writers.calibration(), lookup.get("minikv"), tiny_config(), path, details)

    return saved(directory, directory.parent / "calibration", save) / "calibration.json"


def read_calibration(directory: pathlib.Path) -> None:
    lookup.get(str(directory / "saved"))


def sweep(directory: pathlib.Path) -> pathlib.Path:
    return saved(directory, directory.parent / "sweep", writers.sweep_once) / "sweep.json"


def sweep_rows(directory: pathlib.Path) -> pathlib.Path:
    return sweep(directory).with_name("rows.jsonl")


def read_sweep(directory: pathlib.Path) -> None:
    sweep_store.check(directory / "saved")


def results(directory: pathlib.Path) -> pathlib.Path:
    recorded = sorted((pathlib.Path(bench.__file__).parent / "results").glob("generate_*.json"))[0]
    report = json.loads(recorded.read_text())
    path = directory / "results.json"
    path.write_text(json.dumps(report | {"results": report["results"][:2]}))
    return path


def read_results(directory: pathlib.Path) -> None:
    figures.table(figures.read_report(directory / "results.json")["results"])


# Downloads ------------------------------------------------------------------------------------------------------------

UNPACKED = b"".join(json.dumps({"number": number, "text": "x" * 50}).encode() + b"\n" for number in range(20))


def archive(directory: pathlib.Path) -> pathlib.Path:
    path = directory / "hub" / "0" / "data.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("data/a.jsonl", UNPACKED)
    return path


def parquet(directory: pathlib.Path) -> pathlib.Path:
    path = directory / "hub" / "0" / "a-00000.parquet"
    path.parent.mkdir(parents=True)
    stream = io.BytesIO()
    rows = [json.loads(line) for line in UNPACKED.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, write_page_checksum=True)
    path.write_bytes(stream.getvalue())
    return path


def read_download(directory: pathlib.Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIKV_CACHE_DIR", str(directory / "cache"))
        patch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directory / "hub" / "0"))
        made = locate(pathlib.Path("a/b"), ("*.zip", "*.parquet"))
    for path in made.iterdir():
        for number, row in files.read_jsonl(path):  # what is read is correct, whatever the names of the keys
            assert list(row.values()) == [number - 1, "x" * 50]


NULLABLE = {"nll": ("NoneType",), "full_nll": ("NoneType",), "kl_to_full": ("NoneType",)}
NULLABLE |= {
    "top1_agreement": ("NoneType",),
    "exact_match": ("NoneType", "bool"),
    "score": ("NoneType", "number", "int"),
}
METHOD = {"method.heavy": ("number", "int"), "method.recent": ("number", "int"), "method.evict_every": ("int",)}
METHOD |= {"method.quantizer": ("NoneType",)}
NOT_READ = ("command", "backend", "memory_bytes", "read_bytes_per_s", "copy_bytes_per_s", "versions", "compilation")
NOT_READ_IN_ROWS = ("steps", "dtype", "plugins", "memory_limit_bytes", "versions", "time_to_first_token_s", "decode")
NOT_READ_IN_ROWS += ("weight_bytes", "predicted_bytes")

KINDS = {
    "cases of ids": Kind(cases_of_ids, read_cases, Format()),
    "cases of text": Kind(cases_of_text, read_cases, Format()),
    "longbench": Kind(
        longbench,
        read_longbench,
        Format(
            kinds={"_id": ("int", "NoneType"), "all_classes": ("NoneType",)},
            free=("length", "dataset", "language"),
            optional=("_id", "length", "dataset", "language"),
            any_integer=("_id",),
            is_open=True,
        ),
    ),
    "longbench, whole prompts": Kind(
        whole_prompts,
        read_longbench,
        Format(kinds={"id": ("str", "NoneType")}, optional=("id",), any_integer=("id",), is_open=True),
    ),
    "longbench, templates": Kind(longbench_templates, read_longbench, Format(optional=("qasper",), is_open=True)),
    "infinitebench": Kind(
        infinitebench,
        read_infinitebench,
        Format(
            kinds={"id": ("str", "NoneType"), "answer": ("str", "int"), "answer[]": ("int",)},
            optional=("id",),
            any_integer=("id", "answer"),
            is_open=True,
        ),
    ),
    "infinitebench, templates": Kind(infinitebench_templates, read_infinitebench, Format(is_open=True)),
    "gsm8k": Kind(gsm8k, read_gsm8k, Format(is_open=True)),
    "token ids": Kind(token_ids, read_token_ids, Format()),
    "cache.json": Kind(cache, read_cache, Format(kinds=METHOD)),
    "arrays of a cache": Kind(cache_arrays, read_cache),
    "calibration.json": Kind(calibration, read_calibration, Format(kinds=METHOD, free=("details",))),
    "sweep.json": Kind(
        sweep,
        read_sweep,
        Format(
            kinds={"description.implementation": ("str",)},
            free=("description.options", *(f"points.{name}.fields" for name in writers.METHODS)),
            maps=tuple(f"points.{name}.{key}" for name in writers.METHODS for key in ("versions", "files")),
        ),
    ),
    "rows.jsonl": Kind(
        sweep_rows,
        read_sweep,
        Format(kinds=NULLABLE, optional=("text", "score"), any_integer=tuple(NULLABLE)),
    ),
    "results of the benchmark": Kind(
        results,
        read_results,
        Format(
            kinds={"results.peak_bytes": ("NoneType",), "results.times_floor": ("NoneType",)},
            free=(*NOT_READ, *(f"results.{name}" for name in NOT_READ_IN_ROWS)),
            maps=("results.compile_s",),
            is_open=True,
        ),
    ),
    "zip archive": Kind(archive, read_download),
    "parquet": Kind(parquet, read_download),
}


# The fuzzer -----------------------------------------------------------------------------------------------------------


def one(kind: Kind, directory: pathlib.Path, generator: random.Random) -> str:
    """Damages one file, and returns "refused" or "read"; any other outcome fails the test."""
    directory.mkdir()
    path = kind.make(directory)
    good, must_refuse, what = path.read_bytes(), False, "bytes"
    if kind.format is None or generator.random() < 0.25:
        path.write_bytes(damage(good, generator))
        must_refuse = "arrays" in path.parts and path.read_bytes() != good
    elif path.suffix == ".jsonl":
        *rows, _ = good.split(b"\n")
        number = generator.randrange(len(rows))
        mutation = mutate(json.loads(rows[number]), generator)
        rows[number] = mutation.text.encode()
        path.write_bytes(b"\n".join([*rows, b""]))
        must_refuse, what = kind.format.refuses(mutation), repr(mutation)[:500]
    else:
        mutation = mutate(json.loads(good), generator)
        path.write_text(mutation.text)
        must_refuse, what = kind.format.refuses(mutation), repr(mutation)[:500]
    began = time.perf_counter(), time.process_time()
    try:
        kind.read(directory)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.isprintable(), what
        assert len(message) < 600, what
        assert str(directory) in message, (what, message)
        return "refused"
    finally:
        assert time.perf_counter() - began[0] < LONGEST_SECONDS, what
        assert time.process_time() - began[1] < LONGEST_CPU_SECONDS, what
    assert not must_refuse, f"accepted: {what}"
    return "read"


def fuzz(name: str, directory: pathlib.Path, count: int, seed: str) -> Counter[str]:
    kind, counts = KINDS[name], Counter[str]()
    (directory / "good").mkdir()
    kind.make(directory / "good")
    kind.read(directory / "good")  # which is accepted
    for number in range(count):
        place = directory / f"{seed}-{number}"
        counts[one(kind, place, random.Random(f"{name} {seed} {number}"))] += 1
        shutil.rmtree(place)
    return counts


def report(capsys: pytest.CaptureFixture[str], name: str, counts: Counter[str]) -> None:
    with capsys.disabled():
        print(
            f"\n{name}: {counts.total()} damaged files, {counts['refused']} refused in one line, {counts['read']} read"
        )


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_in_one_line_or_read_right(name: str, tmp_path: pathlib.Path):
    assert fuzz(name, tmp_path, 25, "few").total() == 25


@pytest.mark.campaign
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    counts = fuzz(name, tmp_path, 120, "many")
    report(capsys, name, counts)
    assert counts["refused"] > 30
