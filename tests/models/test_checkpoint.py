"""Tests Orbax checkpoints of models: saving, restoring, and refusals of damaged ones."""

import gc
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.tiny import tiny_model

from minikv_jax.models import checkpoint
from minikv_jax.models.config import RopeScaling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_round_trip(tmp_path: pathlib.Path, dtype: str):
    rope = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16)
    model = tiny_model(dtype=dtype, model_type="qwen3", rope_scaling=rope, eos_token_ids=(2, 5))
    checkpoint.save(model, tmp_path / "saved")
    assert checkpoint.is_checkpoint(tmp_path / "saved")
    assert checkpoint.restore_config(tmp_path / "saved") == model.config
    restored = checkpoint.restore(tmp_path / "saved", dtype=dtype)
    assert restored.config == model.config
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(restored), nnx.state(model)))
    half = checkpoint.restore(tmp_path / "saved", dtype="float16")
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(nnx.state(half)))
    with pytest.raises(FileExistsError, match="saved exists: give a new path"):
        checkpoint.save(model, tmp_path / "saved")


def test_orbax_that_does_not_fit_its_config_is_an_error(tmp_path: pathlib.Path):
    checkpoint.save(tiny_model(), tmp_path / "saved")
    stored = tmp_path / "saved" / "config" / "metadata"
    raw = json.loads(stored.read_text())
    stored.write_text(json.dumps(raw | {"num_hidden_layers": 1, "intermediate_size": 96, "attention_bias": True}))
    with pytest.raises(ValueError, match="does not fit its config") as error:
        checkpoint.restore(tmp_path / "saved")
    for part in (
        "unknown tensors: layers.1.",
        "layers.0.self_attn.o_proj.bias",
        "layers.0.mlp.gate_up_proj.kernel is [48, 160], the config needs [48, 192]",
    ):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "saved"
    checkpoint.save(tiny_model(), directory)
    return directory


def largest(directory: pathlib.Path) -> pathlib.Path:
    """Returns the file with most of the arrays' bytes."""
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage_directories(directory: pathlib.Path) -> None:
    """Truncates the files that locate the arrays."""
    for path in (directory / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:300])


DAMAGES: dict[str, Callable[[pathlib.Path], object]] = {
    "no manifest": lambda at: (at / "params" / "manifest.ocdbt").unlink(),
    "manifest": lambda at: (at / "params" / "manifest.ocdbt").write_bytes(b"x"),
    "no metadata": lambda at: (at / "params" / "_METADATA").unlink(),
    "other metadata": lambda at: (at / "params" / "_METADATA").write_text("{}"),
    "no arrays": lambda at: shutil.rmtree(at / "params"),
    "no data": lambda at: largest(at).unlink(),
    "truncated data": lambda at: largest(at).write_bytes(largest(at).read_bytes()[:1000]),
    "other data": lambda at: largest(at).write_bytes(bytes(largest(at).stat().st_size)),
    "directory": lambda at: damage_directories(at),
    "no config": lambda at: (at / "config" / "metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orbax_is_named_in_one_line(
    saved: pathlib.Path, tmp_path: pathlib.Path, damage: str, capfd: pytest.CaptureFixture[str]
):
    """TensorStore, whose reads of other arrays end later, prints nothing."""
    directory = tmp_path / "damaged"
    shutil.copytree(saved, directory)
    DAMAGES[damage](directory)
    with pytest.raises(ValueError, match="damaged is not a complete minikv_jax checkpoint: ") as error:
        checkpoint.restore(directory)
    assert str(error.value).isprintable()
    assert len(str(error.value).replace(str(directory), "")) < 350
    del error
    gc.collect()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config/metadata", "x", "is not valid JSON"),
        ("config/metadata", "[" * 100_000, "is not valid JSON"),
        ("config/metadata", "[]", "holds a JSON list"),
        ("config/metadata", '{"vocab_size": 3}', "lacks hidden_size, "),
        ("params/_METADATA", "x", "is not valid JSON"),
        ("params/_METADATA", "[" * 100_000, "is not valid JSON"),
        ("_CHECKPOINT_METADATA", "\x1b[2J", "is not valid JSON"),
    ],
)
def test_a_damaged_json_file_is_named(
    saved: pathlib.Path, tmp_path: pathlib.Path, name: str, text: str, message: str, capfd: pytest.CaptureFixture[str]
):
    directory = tmp_path / "damaged"
    shutil.copytree(saved, directory)
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        checkpoint.restore(directory)
    if name.startswith("config"):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            checkpoint.restore_config(directory)
    assert capfd.readouterr().err == ""


def test_a_link_out_of_a_checkpoint_is_refused(saved: pathlib.Path, tmp_path: pathlib.Path):
    directory = tmp_path / "linked"
    shutil.copytree(saved, directory)
    data = largest(directory)
    shutil.move(data, tmp_path / "outside")
    data.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is not accepted: it is a link that leaves the directory"):
        checkpoint.restore(directory)
