"""Tests every kind of model against transformers (torch, CPU, float32): logits, greedy tokens, compressed caches."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import kinds_table
from support.family_cases import KINDS, write_kind

from minikv_jax.generate import generate
from minikv_jax.meshes import make_mesh
from minikv_jax.models.huggingface import load_safetensors
from minikv_jax.one_shot import one_shot

T, NEW = 24, 8  # tokens of the prompt, longer than any window, and after it
BOUND = 1e-4  # float32 roundings of both sides, where logits reach 15


def greedy(model: Any, ids: np.ndarray, count: int = NEW) -> torch.Tensor:
    """Generates `count` tokens after `ids` with transformers."""
    with torch.no_grad():
        options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        return model.generate(torch.from_numpy(ids), do_sample=False, eos_token_id=None, **options)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_greedy_tokens(name: str, tmp_path: pathlib.Path):
    """The greedy choices along transformers' own continuation are the same."""
    theirs = write_kind(KINDS[name], tmp_path)
    ours = load_safetensors(tmp_path)
    prompt = np.random.default_rng(1).integers(0, 96, (1, T))
    tokens = greedy(theirs, prompt)
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    found = np.asarray(jax.jit(one_shot)(ours, jnp.asarray(tokens.numpy(), jnp.int32)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * max(1.0, np.max(np.abs(expected))))
    np.testing.assert_array_equal(np.argmax(found[:, T - 1 :], axis=-1), np.argmax(expected[:, T - 1 :], axis=-1))


def test_the_page_lists_every_kind():
    """docs/models.md comes from `support/kinds_table.py`."""
    cells = kinds_table.documented()
    assert [row[:2] for row in cells] == [[name, f"`{kind.model_type}`"] for name, kind in KINDS.items()]
    assert all(float(row[2]) <= BOUND * max(1.0, float(row[3])) for row in cells)
    assert {row[4] for row in cells} == {"all"}


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_long_continuation(name: str):
    measured = kinds_table.measure(KINDS[name])
    assert measured.difference <= BOUND * max(1.0, measured.largest)
    assert measured.equal == kinds_table.NEW


# A kind of each way in which layers differ: norms, windows, RoPE, soft caps, biases, factors.
DIFFERENT = ("Gemma 2", "Gemma 3", "OLMo 2", "Phi-3 128k, Phi-4-mini (LongRoPE)", "Granite 3", "EXAONE 4", "Command R+")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DIFFERENT)
def test_compressed_caches(name: str, tmp_path: pathlib.Path):
    check_compressed(name, tmp_path)


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_all_compressed_caches(name: str, tmp_path: pathlib.Path):
    check_compressed(name, tmp_path)


def check_compressed(name: str, tmp_path: pathlib.Path) -> None:
    """Checks that the first token comes from the whole prompt, and that the logits of others are numbers."""
    write_kind(KINDS[name], tmp_path)
    model = load_safetensors(tmp_path)
    method = "snapkv" if model.config.head_dim % 16 else "minikv-snap"  # which packs groups of 16 channels
    prompt = np.random.default_rng(1).integers(0, 96, (1, T)).tolist()
    found = generate(model, prompt, method=method, max_new_tokens=NEW, eos_token_ids=(), implementation="xla")
    first = jnp.argmax(one_shot(model, jnp.asarray(prompt, jnp.int32))[0, -1])
    assert int(found.tokens[0, 0]) == int(first)
    assert bool(jnp.all(found.finite))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Gemma 3", "OLMo 2", "Phi-1, Phi-1.5, Phi-2"])
def test_two_devices(name: str, tmp_path: pathlib.Path):
    """A model split over two devices gives the logits of one device."""
    write_kind(KINDS[name], tmp_path)
    mesh = make_mesh({"model": 2})
    model, split = load_safetensors(tmp_path), load_safetensors(tmp_path, mesh=mesh)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 96, (1, T)), jnp.int32)
    one = jax.jit(one_shot)(model, ids)
    with jax.set_mesh(mesh):
        two = jax.jit(one_shot)(split, ids)
    np.testing.assert_allclose(two, one, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(one))))
