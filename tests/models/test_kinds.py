"""Tests every kind of model against transformers (torch, CPU, float32): logits, greedy tokens, compressed caches."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.family_cases import KINDS, write_kind

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
