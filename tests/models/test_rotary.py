"""Tests rotary embeddings and their scaling."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import random_ids, tiny_config, tiny_model

from minikv_jax.models.config import RopeScaling
from minikv_jax.models.rotary import channel_order, inverse_frequencies, rotary_tables, rotate
from minikv_jax.one_shot import one_shot

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


def test_channels_are_reordered_to_halves():
    rope = tiny_config(head_dim=8, rotary_dim=4).rope(0)
    assert channel_order(rope, interleaved=False).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert channel_order(rope, interleaved=True).tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
    whole = tiny_config(head_dim=8).rope(0)
    assert channel_order(whole, interleaved=False).tolist() == list(range(8))


def test_channels_that_are_not_rotated_stay():
    config = tiny_config(rotary_dim=8, unrotated_layers=(1,))
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 16))
    positions = jnp.arange(3)[None] + 7
    turned = rotate(x, *rotary_tables(config.rope(0), positions))
    rest = np.r_[4:8, 12:16]
    np.testing.assert_array_equal(turned[..., rest], x[..., rest])
    assert not np.allclose(turned[..., :4], x[..., :4])
    np.testing.assert_array_equal(rotate(x, *rotary_tables(config.rope(1), positions)), x)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="dynamic", factor=4.0, original_max_position_embeddings=8),
        RopeScaling(
            rope_type="longrope",
            factors=(1.0,) * 8,
            long_factors=tuple(2.0 + i for i in range(8)),
            original_max_position_embeddings=8,
        ),
    ],
    ids=lambda scaling: scaling.rope_type,
)
def test_frequencies_follow_the_length_of_each_row(scaling: RopeScaling):
    """A short row beside a long one gives the logits that it gives alone."""
    model, ids = tiny_model(rope_scaling=scaling), random_ids((2, 14))
    lengths = jnp.array([14, 6])
    both = jax.jit(one_shot)(model, ids, lengths)
    for row, length in enumerate((14, 6)):
        alone = jax.jit(one_shot)(model, ids[row : row + 1, :length])
        np.testing.assert_allclose(both[row, :length], alone[0], atol=2e-5)
    plain = jax.jit(one_shot)(tiny_model(), ids, lengths)
    np.testing.assert_allclose(both[1, :6], plain[1, :6], atol=2e-5)
    assert np.max(np.abs(both[0] - plain[0])) > 1e-2
