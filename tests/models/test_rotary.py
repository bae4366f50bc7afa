"""Tests rotary embeddings and their scaling."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config

from minikv_jax.models.config import RopeScaling
from minikv_jax.models.rotary import inverse_frequencies, rotary_tables, rotate

LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "linear"},
        {"factor": 2.0},
        {"low_freq_factor": 0.5},
        {"high_freq_factor": 8.0},
        {"original_max_position_embeddings": 64},
        {"rope_type": "factors", "factors": tuple(1.0 + i for i in range(8))},
    ],
)
def test_every_scaling_field_is_read(change: dict[str, Any]):
    before = inverse_frequencies(tiny_config(rope_scaling=LLAMA3).rope(0))
    after = inverse_frequencies(tiny_config(rope_scaling=dataclasses.replace(LLAMA3, **change)).rope(0))
    assert before.dtype == after.dtype == np.float32
    assert not np.allclose(before, after, rtol=1e-3)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
    plain = inverse_frequencies(tiny_config(head_dim=64).rope(0))
    scaled = inverse_frequencies(tiny_config(head_dim=64, rope_scaling=LLAMA3).rope(0))
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 16 / 4], plain[wavelengths < 16 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 16], plain[wavelengths > 16] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


def test_rotation_depends_on_the_distance_only():
    config = tiny_config()
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(at: int, distance: int) -> jax.Array:
        turned = [rotate(x, *rotary_tables(config.rope(0), jnp.array([[p]]))) for x, p in ((q, at + distance), (k, at))]
        return jnp.sum(turned[0] * turned[1])

    # float32 angles of up to 60 radians are off by 60 * 2**-24, which a product of two unit rotations doubles.
    np.testing.assert_allclose(score(0, 5), score(50, 5), rtol=1e-4, atol=1e-4)
    assert abs(score(0, 5) - score(0, 6)) > 1e-2
