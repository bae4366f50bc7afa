"""Tests saved arrays: what is restored, and what is refused."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.full_disk import full_disk

from minikv_jax import saved_arrays


class Record(saved_arrays.Description):
    rows: int = 0


ARRAYS = {"k": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "lengths": (jnp.array([7], jnp.int32),)}


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_arrays_come_back_in_their_structure(tmp_path: pathlib.Path):
    saved = saved_arrays.save(tmp_path / "new" / "saved", ARRAYS, {"rows": 2}, kind="cache")
    assert saved == (tmp_path / "new" / "saved").resolve()
    assert saved_arrays.holds(saved, "cache")
    assert not saved_arrays.holds(saved, "calibration")
    assert saved_arrays.read_description(saved, "cache", Record).rows == 2
    stored = {str(path.relative_to(saved)) for path in (saved / "arrays").rglob("*") if path.is_file()}
    assert json.loads((saved / "cache.json").read_text())["files"].keys() == stored
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    loaded = load(saved, shapes(ARRAYS))
    assert jax.tree.structure(loaded) == jax.tree.structure(ARRAYS)
    for leaf, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(ARRAYS), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def test_numpy_leaves_come_back_as_numpy(tmp_path: pathlib.Path):
    """Arrays loaded during tracing must not become part of the trace."""
    saved = saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    like = jax.tree.map(np.asarray, ARRAYS)
    loaded = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.int32(isinstance(leaf, np.ndarray)), load(saved, like)))()
    assert jax.tree.leaves(loaded) == [1, 1]


def load(directory: pathlib.Path, like):
    return saved_arrays.load(str(directory), saved_arrays.read_description(directory, "cache", Record), like)


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
    saved = saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(ValueError, match=message):
        load(saved, convert(ARRAYS | change))


def test_what_is_there_and_what_is_missing(tmp_path: pathlib.Path):
    saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(FileExistsError, match="saved exists: give a new path"):
        saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    with pytest.raises(FileNotFoundError, match=r"holds no saved calibration: calibration\.json is missing"):
        saved_arrays.read_description(tmp_path / "saved", "calibration", Record)
    with pytest.raises(FileNotFoundError, match="arrays does not exist"):
        saved_arrays.load(tmp_path, Record(files={}), shapes(ARRAYS))
    (tmp_path / "saved" / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json is not valid JSON"):
        saved_arrays.read_description(tmp_path / "saved", "cache", Record)


def test_damage_is_one_line_that_names_the_file(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]):
    """Any file may have a flipped byte, be cut short, or be missing."""
    saved = saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    capfd.readouterr()
    files = [path for path in (saved / "arrays").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (bytes(flipped), content[:-1], b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^[^\n]*is damaged: its SHA-256 is not[^\n]*$") as caught:
                load(saved, shapes(ARRAYS))
            assert str(path) in str(caught.value)
        path.unlink()
        with pytest.raises(ValueError, match=f"saved: the file '{path.relative_to(saved)}' is missing"):
            load(saved, shapes(ARRAYS))
        path.write_bytes(content)
    load(saved, shapes(ARRAYS))
    assert capfd.readouterr().err == ""


def change_description(directory: pathlib.Path, **changes: object) -> None:
    path = directory / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_orbax_raises_is_one_line(tmp_path: pathlib.Path):
    """The checksums fit, but the files are not a checkpoint."""
    saved = saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    for path in (saved / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x")
    sums = json.loads((saved / "cache.json").read_text())["files"]
    change_description(saved, files=dict.fromkeys(sums, hashlib.sha256(b"x").hexdigest()))
    with pytest.raises(ValueError, match=r"^\S*arrays is not a complete Orbax checkpoint: [^\n]{,300}$") as caught:
        load(saved, shapes(ARRAYS))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("size", [0, 100, 4096, 200_000])
def test_a_full_disk_leaves_nothing_and_is_one_line(
    caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path, size: int, capfd: pytest.CaptureFixture[str]
):
    """The disk may fill up while the directory's files or the arrays are written."""
    arrays = {"k": jax.random.bits(jax.random.key(0), (100_000,), "uint32")}
    jax.block_until_ready(arrays)
    with full_disk(size), pytest.raises(OSError, match="File too large") as caught:
        saved_arrays.save(tmp_path / "saved", arrays, {}, kind="cache")
    assert str(caught.value) == f"[Errno 27] File too large: '{tmp_path / 'saved'}'"
    assert not (tmp_path / "saved").exists()
    assert (capfd.readouterr().err, caplog.messages) == ("", [])
    saved_arrays.save(tmp_path / "saved", arrays, {}, kind="cache")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # whatever the failed save left is gone


@pytest.mark.parametrize("outside", ["../other", "/dev/zero", "arrays/../../other"])
def test_only_files_of_the_directory_are_read(tmp_path: pathlib.Path, outside: str):
    saved = saved_arrays.save(tmp_path / "saved", ARRAYS, {}, kind="cache")
    change_description(saved, files={outside: "0"})
    with pytest.raises(ValueError, match=f"saved: the file '{outside}' is missing"):
        load(saved, shapes(ARRAYS))
    change_description(saved, files={})
    with pytest.raises(ValueError, match="saved: the file 'arrays/_CHECKPOINT_METADATA' is not one that was saved"):
        load(saved, shapes(ARRAYS))
