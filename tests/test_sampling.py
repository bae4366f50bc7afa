"""Tests sampling: refused settings, the tokens kept by the limits, and small temperatures."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import minikv_jax as mk
from minikv_jax.sampling import sample


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf: expected a finite number"),
        ({"temperature": "1"}, "temperature='1': expected a finite number at least 0"),
        ({"temperature": None}, "temperature=None: expected a finite number at least 0"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k=1.5: expected an integer"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "min_p": 0.0}, "min_p=0.0"),
        ({"top_k": 3}, "temperature > 0"),
    ],
)
def test_wrong_sampling_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        mk.Sampling(**fields)


@pytest.mark.parametrize(
    ("limit", "kept"), [({"top_p": 0.75}, {0, 1}), ({"min_p": 0.25}, {0, 1, 2}), ({"top_k": 1}, {0})]
)
def test_limits_keep_the_likely_tokens(limit: dict[str, Any], kept: set[int]):
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    sampling = mk.Sampling(temperature=1.0, **limit)
    assert {int(sample(logits, sampling, jax.random.key(seed))[0]) for seed in range(100)} == kept


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-38, 1e-45])
def test_a_small_temperature_is_greedy(temperature: float):
    logits = jnp.asarray([[3.0, 88.0, 87.5, -20.0]])
    assert int(sample(logits, mk.Sampling(temperature=temperature), jax.random.key(0))[0]) == 1
