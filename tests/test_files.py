import pathlib
from typing import Any

import pytest

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
