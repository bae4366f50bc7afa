"""Tests files: errors that name them, and atomic writes."""

import os
import pathlib
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.full_disk import full_disk

from minikv_jax import files


def written(tmp_path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path = tmp_path / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_json_and_lines(tmp_path: pathlib.Path):
    assert files.read_text(written(tmp_path, "naïve\n")) == "naïve\n"
    assert files.read_json(written(tmp_path, '{"a": 1}')) == {"a": 1}
    assert files.read_json_list(written(tmp_path, "[1, 2]")) == [1, 2]
    # A line separator of Unicode may stand inside a string: only "\n" ends a line.
    path = written(tmp_path, '{"a": 1}\n\n{"a": "x\u2028y"}\n{"a": 3}\n')
    assert list(files.read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": 3})]
    assert list(files.read_jsonl(path, limit=1)) == [(1, {"a": 1})]


def rows(path: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    return list(files.read_jsonl(path))


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (files.read_text, b"\xff", "file is not UTF-8 text"),
        (files.read_json, b"\xff", "file is not UTF-8 text"),
        (files.read_json, '{"a"', "file is not valid JSON"),
        (files.read_json, '{"a": 1, "b": 2, "a": 3}', "file is not valid JSON: the key 'a' is there twice"),
        (files.read_json, "[" * 100_000, "file is not valid JSON: "),
        (files.read_json, r'{"a": ["\ud83d\ude00 \ud83d"]}', r"file: '\\ud83d' is half a character"),
        (files.read_json, "[]", "file holds a JSON list, expected an object"),
        (files.read_json_list, "{}", "file holds a JSON dict, expected a list"),
        (rows, '{"a": 1}\n{"a"', "file, line 2 is not valid JSON"),
        (rows, "\n[1]", "file, line 2: expected a JSON object, got a list"),
        (rows, b'{"a": 1}\n{"a": "\xff"}', "file, line 2 is not UTF-8 text"),
        (rows, "\n", "file is empty: expected one JSON object per line"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: pathlib.Path, read, content: str | bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, content))
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_replaces_what_was_there(tmp_path: pathlib.Path):
    path = tmp_path / "new" / "out.json"
    files.write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    path.chmod(0o600)
    files.write_text(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(path.parent) == ["out.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert path.read_bytes() == "naïve".encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize(
    "make", [lambda part: part.write_text("half"), lambda part: (part / "deep").mkdir(parents=True)]
)
def test_what_fails_or_is_interrupted_leaves_the_old_file(
    tmp_path: pathlib.Path, error: type[BaseException], make: Callable[[pathlib.Path], Any]
):
    (tmp_path / "old").write_text("old")
    for name in ("old", "none"):

        def write(path: pathlib.Path = tmp_path / name) -> None:
            with files.replacing(path) as part:
                make(part)
                raise error

        with pytest.raises(error):
            write()
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "out"
    files.write_bytes(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match=rf"File too large: '{path}'$"):
        files.write_bytes(path, b"x" * 100_000)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["out"])


def test_what_a_killed_process_left_is_removed(tmp_path: pathlib.Path):
    program = """
import os, sys
from minikv_jax import files
with files.replacing(sys.argv[1]) as part:
    part.write_text("half")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -9
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    files.write_text(path, "whole")
    assert names(tmp_path) == ["out"]


def test_a_path_that_must_be_new(tmp_path: pathlib.Path):
    with files.replacing(tmp_path / "new", new=True) as part:
        (part / "deep").mkdir(parents=True)
        (part / "deep" / "file").write_text("x")
    assert (tmp_path / "new" / "deep" / "file").read_text() == "x"
    with (
        pytest.raises(FileExistsError, match="new exists: give a new path"),
        files.replacing(tmp_path / "new", new=True),
    ):
        pass
    with files.replacing(tmp_path / "nothing"):
        pass  # a block that writes nothing
    assert names(tmp_path) == ["new"]
    with pytest.raises(OSError, match=rf"'{tmp_path / 'new'}'$"), files.replacing(tmp_path / "new") as part:
        part.mkdir()
    assert (tmp_path / "new" / "deep" / "file").read_text() == "x"


def test_one_process_writes_at_a_time(tmp_path: pathlib.Path):
    """A second writer waits for its patience, and is then refused."""
    path, inside, go_on = tmp_path / "out", threading.Event(), threading.Event()

    def write() -> None:
        with files.replacing(path) as part:
            inside.set()
            go_on.wait()
            part.write_text("first")

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    with pytest.raises(BlockingIOError, match="out is being written by another process"), files.replacing(path, 0):
        pass
    threading.Timer(0.1, go_on.set).start()
    with files.replacing(path, -1) as part:
        assert path.read_text() == "first"
        part.write_text("second")
    thread.join()
    assert path.read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_links_devices_and_the_commands_own_output_stay(tmp_path: pathlib.Path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    files.write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    program = "import sys; from minikv_jax import files; print('a', flush=True); files.write_text('/dev/stdout', 'b')"
    with (tmp_path / "printed").open("w") as stream:  # as for a shell's >
        subprocess.run([sys.executable, "-c", program], stdout=stream, check=True)
    assert (tmp_path / "printed").read_text() == "a\nb"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"a\nb"


def test_a_long_name(tmp_path: pathlib.Path):
    path = tmp_path / ("ü" * 127)
    files.write_text(path, "x")
    assert names(tmp_path) == [path.name]


def test_appended_lines_are_whole(tmp_path: pathlib.Path):
    path = tmp_path / "rows.jsonl"
    with files.appending(path) as append:
        append({"a": 1})
        append({"b": "é\n"})
        assert files.read_log(path) == ([(1, {"a": 1}), (2, {"b": "é\n"})], b"")
        size = path.stat().st_size
        with full_disk(size + 7), pytest.raises(OSError, match=rf"File too large: '{path}'$"):
            append({"c": "x" * 100})
        assert path.stat().st_size == size
        append({"d": 4})
    with path.open("a") as stream:
        stream.write('{"e": ')
    assert files.read_log(path) == ([(1, {"a": 1}), (2, {"b": "é\n"}), (3, {"d": 4})], b'{"e": ')
    path.write_text('{"a": 1}\n\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not valid JSON"):
        files.read_log(path)
