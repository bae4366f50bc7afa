"""Tests that models with experts, sinks and latents generate as transformers does, and with compressed caches."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.family_cases import KINDS, write_kind
from support.tiny import random_ids

from minikv_jax.generate import generate
from minikv_jax.meshes import make_mesh
from minikv_jax.models.huggingface import load_safetensors

pytestmark = pytest.mark.slow
T, NEW = 24, 8


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", ["Mixtral, windows, tied", "Qwen3-MoE", "gpt-oss", "Llama 4, text", "DeepSeek-V3"])
def test_generated_tokens(name: str, tmp_path: pathlib.Path):
    """The whole cache gives transformers' greedy tokens. A compressed one begins alike and goes on with numbers."""
    theirs = write_kind(KINDS[name], tmp_path)
    ours = load_safetensors(tmp_path)
    prompt = random_ids((1, T))
    with torch.no_grad():
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
        expected = theirs.generate(torch.from_numpy(np.array(prompt)).long(), do_sample=False, **options)[0, T:].numpy()
    found = generate(ours, prompt, method="full", max_new_tokens=NEW, eos_token_ids=())
    np.testing.assert_array_equal(found.tokens[0], expected)
    compressed = generate(ours, prompt, method="minikv-snap", max_new_tokens=NEW, eos_token_ids=())
    assert int(compressed.tokens[0, 0]) == expected[0]
    assert bool(jnp.all(compressed.finite))


@pytest.mark.filterwarnings("ignore")
def test_a_mesh_gives_the_same_tokens(tmp_path: pathlib.Path):
    """Loaded onto four devices: experts by columns, sinks by heads, rows apart."""
    write_kind(KINDS["gpt-oss"], tmp_path)
    model, split = (load_safetensors(tmp_path, mesh=mesh) for mesh in (None, make_mesh({"data": 2, "model": 2})))
    one, four = (generate(m, random_ids((2, T)), method="minikv", max_new_tokens=4) for m in (model, split))
    np.testing.assert_array_equal(four.tokens, one.tokens)
