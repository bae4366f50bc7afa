import gc
import json
import pathlib
import sys
import time

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


@pytest.mark.parametrize("damage", ["config/metadata", "params/_METADATA", "params/manifest.ocdbt"])
def test_damaged_orbax_is_named(tmp_path: pathlib.Path, damage: str, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save(tiny_model(), tmp_path / "saved")
    (tmp_path / "saved" / damage).write_bytes(b"x")
    # Orbax reads the arrays together and closes its event loop at the first failure; the others then report to it.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(ValueError, match="saved is not a complete minikv_jax checkpoint"):
        checkpoint.restore(tmp_path / "saved")
    gc.collect()
    time.sleep(0.5)
