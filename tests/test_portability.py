"""Tests that generation with "xla" lowers for accelerators that are not present."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.tiny import tiny_model

from minikv_jax import meshes
from minikv_jax.methods import lookup
from minikv_jax.models.partition import shard_model
from minikv_jax.programs import Inputs, Settings, run
from minikv_jax.sampling import Sampling

PLATFORMS = ("tpu", "rocm")


@pytest.mark.parametrize("mesh", [None, "data=2,model=4"])
@pytest.mark.parametrize("method", ["minikv", "twin-4bit", "h2o", "full"])
def test_generation_lowers_for_other_platforms(method: str, mesh: str | None):
    model = tiny_model(
        num_attention_heads=8, num_key_value_heads=4, intermediate_size=96, head_dim=32, max_position_embeddings=256
    )
    rows = None
    if mesh is not None:
        model = shard_model(model, meshes.make_mesh(meshes.parse(mesh)))
        assert model.mesh is not None
        rows = meshes.sharding(model.mesh, meshes.DATA)
    graph, params = nnx.split(model)
    settings = Settings(16, Sampling(temperature=1.0, top_k=8), (3,), "xla", True)
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=rows)
    with meshes.use(model.mesh):
        inputs = Inputs(None, ids, lengths, jax.random.key(0))
        traced = run.trace(graph, settings, lookup.get(method), params, *inputs)
        text = traced.lower(lowering_platforms=PLATFORMS).as_text()
    assert "while" in text
    assert ("num_partitions = 8" in text) == (mesh is not None)
