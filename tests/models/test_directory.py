"""Tests that the files named by a checkpoint lie in its directory."""

import json
import pathlib
import shutil

import pytest
from support.checkpoints import random_tensors, write_hf
from support.model_directory import write_model
from support.tiny import tiny_config

from minikv_jax.models import hub
from minikv_jax.models.directory import member
from minikv_jax.models.huggingface import load_safetensors


def point_shard_at(directory: pathlib.Path, name: str) -> None:
    """Writes a sharded model whose index calls the first file `name`."""
    write_hf(directory, tiny_config(), random_tensors(tiny_config()), shards=2)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    weight_map = {tensor: name if "00001" in file else file for tensor, file in values["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{root}/outside.safetensors", "a/../../outside.safetensors", ""]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: pathlib.Path, name: str):
    """The file exists and is valid, but is refused."""
    directory, name = tmp_path / "model", name.format(root=tmp_path)
    point_shard_at(directory, name)
    shutil.move(directory / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"file name '.*' is not accepted: it leaves the directory"):
        load_safetensors(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: pathlib.Path, name: str):
    directory = tmp_path / "model"
    write_model(directory)
    shutil.move(directory / name, tmp_path / "outside")
    (directory / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"'{name}' is not accepted: it is a link that leaves the directory"):
        hub.load(directory)


def test_links_within_a_directory_and_to_a_linked_directory_are_followed(tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    point_shard_at(directory, "first.safetensors")
    (directory / "first.safetensors").symlink_to("model-00001-of-00002.safetensors")
    (tmp_path / "elsewhere").symlink_to(directory)
    for path in (directory, tmp_path / "elsewhere"):
        assert load_safetensors(path).config == tiny_config()


def test_only_a_snapshot_may_link_to_blobs(tmp_path: pathlib.Path):
    for parent in ("snapshots", "others"):
        directory = tmp_path / "models--a--b" / parent / "0123"
        directory.mkdir(parents=True)
        (tmp_path / "models--a--b" / "blobs").mkdir(exist_ok=True)
        (directory / "config.json").symlink_to("../../blobs/abc")
    assert member(tmp_path / "models--a--b" / "snapshots" / "0123", "config.json").is_symlink()
    with pytest.raises(ValueError, match="is a link that leaves the directory"):
        member(tmp_path / "models--a--b" / "others" / "0123", "config.json")
    (tmp_path / "models--a--b" / "snapshots" / "0123" / "x.json").symlink_to("../../../other/blobs/abc")
    with pytest.raises(ValueError, match="is a link that leaves the directory"):
        member(tmp_path / "models--a--b" / "snapshots" / "0123", "x.json")


def test_links_in_a_circle_are_refused(tmp_path: pathlib.Path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises((ValueError, FileNotFoundError)):
        hub.load(tmp_path)
