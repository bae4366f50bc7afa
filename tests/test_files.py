import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
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
    assert files.read_jsonl(path) == [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": 3})]
    assert files.read_jsonl(path, limit=1) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (files.read_text, b"\xff", "file is not UTF-8 text"),
        (files.read_json, b"\xff", "file is not UTF-8 text"),
        (files.read_json, '{"a"', "file is not valid JSON"),
        (files.read_json, "[]", "file holds a JSON list, expected an object"),
        (files.read_json_list, "{}", "file holds a JSON dict, expected a list"),
        (files.read_jsonl, '{"a": 1}\n{"a"', "file, line 2 is not valid JSON"),
        (files.read_jsonl, "\n[1]", "file, line 2: expected a JSON object, got a list"),
        (files.read_jsonl, "\n", "file is empty: expected one JSON object per line"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: pathlib.Path, read, content: str | bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, content))
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


ARRAYS = {"k": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "lengths": (jnp.array([7], jnp.int32),)}


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_arrays_come_back_in_their_structure(tmp_path: pathlib.Path):
    saved = files.save_arrays(tmp_path / "new" / "saved", ARRAYS, {"rows": 2}, kind="cache")
    assert saved == (tmp_path / "new" / "saved").resolve()
    assert files.holds(saved, "cache")
    assert not files.holds(saved, "calibration")
    assert files.read_description(saved, "cache") == {"rows": 2}
    assert json.loads((saved / "cache.json").read_text()) == {"rows": 2}
    loaded = files.load_arrays(str(saved), shapes(ARRAYS))
    assert jax.tree.structure(loaded) == jax.tree.structure(ARRAYS)
    for leaf, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(ARRAYS), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_numpy_leaves_come_back_as_numpy(tmp_path: pathlib.Path):
    """Arrays that are loaded while JAX traces must not become part of the trace."""
    saved = files.save_arrays(tmp_path / "saved", ARRAYS, {}, kind="cache")
    like = jax.tree.map(np.asarray, ARRAYS)
    loaded = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.int32(isinstance(leaf, np.ndarray)), load(saved, like)))()
    assert jax.tree.leaves(loaded) == [1, 1]


def load(directory: pathlib.Path, like):
    return files.load_arrays(directory, like)


@pytest.mark.parametrize("convert", [shapes, lambda tree: jax.tree.map(np.asarray, tree)], ids=["jax", "numpy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 4), jnp.bfloat16)}, r"00000 is bfloat16\[2, 3\], expected bfloat16\[2, 4\]"),
        ({"k": jnp.zeros((2, 3))}, r"00000 is bfloat16\[2, 3\], expected float32\[2, 3\]"),
        ({"lengths": ()}, "arrays holds 2 arrays, expected 1"),
    ],
)
def test_other_arrays_are_named(tmp_path: pathlib.Path, convert, change: dict, message: str):
    saved = files.save_arrays(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(ValueError, match=message):
        files.load_arrays(saved, convert(ARRAYS | change))


def test_what_is_there_and_what_is_missing(tmp_path: pathlib.Path):
    files.save_arrays(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(FileExistsError, match="saved exists: a cache is saved into a new directory"):
        files.save_arrays(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(FileNotFoundError, match=r"holds no saved calibration: calibration\.json is missing"):
        files.read_description(tmp_path / "saved", "calibration")
    with pytest.raises(FileNotFoundError, match="arrays does not exist"):
        files.load_arrays(tmp_path, shapes(ARRAYS))
    (tmp_path / "saved" / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json is not valid JSON"):
        files.read_description(tmp_path / "saved", "cache")


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt"])
def test_damaged_arrays_are_named(tmp_path: pathlib.Path, damaged: str):
    saved = files.save_arrays(tmp_path / "saved", {"k": jnp.ones(3)}, {}, kind="cache")
    (saved / "arrays" / damaged).write_bytes(b"x")
    with pytest.raises(ValueError, match="arrays is not a complete Orbax checkpoint"):
        files.load_arrays(saved, {"k": jax.ShapeDtypeStruct((3,), jnp.float32)})
