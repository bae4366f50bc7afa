"""Rotary position embeddings: plain, linearly scaled, and Llama 3.1's blend of slow and fast frequencies."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Computes the rotary frequencies of RoPE (Su et al., arXiv 2104.09864), float32 `[H/2]`, in radians per position.

    They are a compile-time constant, computed in float32 as in the models' training.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)  # [H/2]
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    return _scale(frequencies, config.rope_scaling)


def _scale(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.rope_type == "factors":
        return frequencies / np.asarray(scaling.factors, np.float32)
    # llama3: the more often a channel pair turns over the original context, the less it is scaled.
    turns = np.float32(scaling.original_max_position_embeddings) * frequencies / np.float32(2 * math.pi)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, unchanged; 0: slow, divided by the factor
    return (1 - keep) * frequencies / np.float32(scaling.factor) + keep * frequencies


def rotary_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Computes cosine and sine of the rotary angles at `positions`, each float32 `[B, T, H/2]`."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T H2"], sin: Float[Array, "#B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) of queries or keys by their angles, in float32; returns the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, N, H/2] each
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
