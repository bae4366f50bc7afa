"""Rotary position embeddings: tables of angles for every kind of scaling, and the rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax.models.config import Rope, RopeScaling


def channel_order(rope: Rope, *, interleaved: bool) -> np.ndarray:
    """Returns the channel of a checkpoint's head that becomes each channel of ours, int `[H]`.

    `rotate` turns the pairs (i, i + H/2). A checkpoint may turn neighbours (`interleaved`), or only its leading
    channels. Then the channels of queries and keys are reordered as they are loaded, which leaves their products as
    they are. Pairs that are not rotated come last.
    """
    turned = np.arange(rope.rotated).reshape(-1, 2).T if interleaved else np.arange(rope.rotated).reshape(2, -1)
    rest = np.arange(rope.rotated, rope.head_dim).reshape(2, -1)
    return np.concatenate([turned, rest], axis=1).reshape(-1)


def inverse_frequencies(rope: Rope, lengths: Int[Array, "B"] | None = None) -> Float[Array | np.ndarray, "*B H2"]:
    """Computes the rotary frequencies of RoPE (Su et al., arXiv 2104.09864), float32, in radians per position.

    They are a compile-time constant, computed in float32 as in the models' training. Pairs of channels that are not
    rotated have frequency 0.

    Args:
      rope: how the layer rotates.
      lengths: length of each row's sequence, read only if `rope.by_length`; None: within the original context.

    Returns:
      `[H/2]`, or `[B, H/2]` if `rope.by_length` and there are lengths.
    """
    exponents = np.arange(0, rope.rotated, 2, dtype=np.float32) / np.float32(max(rope.rotated, 1))  # [rotated/2]
    rest = rope.head_dim // 2 - len(exponents)
    scaling = rope.scaling
    if scaling is not None and scaling.by_length and lengths is not None:
        frequencies = _by_length(exponents, rope, scaling, lengths)
        return jnp.pad(frequencies, ((0, 0), (0, rest)))
    return np.pad(_scale(np.float32(1) / np.float32(rope.theta) ** exponents, scaling), (0, rest))


def _scale(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.rope_type in ("factors", "longrope"):
        return frequencies / np.asarray(scaling.factors, np.float32)[: len(frequencies)]
    if scaling.rope_type == "yarn":
        first, last = scaling.first_blended, scaling.last_blended
        numbers = np.arange(len(frequencies), dtype=np.float32)
        keep = 1 - np.clip((numbers - np.float32(first)) / np.float32(last - first), 0, 1)
    else:  # llama3: the more often a channel pair turns over the original context, the less it is scaled
        turns = np.float32(scaling.original_max_position_embeddings) * frequencies / np.float32(2 * math.pi)
        low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
        # 1: fast, unchanged; 0: slow, divided by the factor. Llama 4 has equal limits, with nothing in between.
        keep = np.clip((turns - low) / (high - low), 0, 1) if low < high else np.float32(turns >= low)
    return (1 - keep) * frequencies / np.float32(scaling.factor) + keep * frequencies


def _by_length(
    exponents: np.ndarray, rope: Rope, scaling: RopeScaling, lengths: Int[Array, "B"]
) -> Float[Array, "B rotated2"]:
    """Frequencies that depend on the length of a row's sequence: those of "longrope" and "dynamic"."""
    original = scaling.original_max_position_embeddings
    if scaling.rope_type == "longrope":
        short, long = (np.asarray(factors, np.float32) for factors in (scaling.factors, scaling.long_factors))
        divisors = jnp.where((lengths > original)[:, None], long[: len(exponents)], short[: len(exponents)])
        return 1 / (divisors * np.float32(rope.theta) ** exponents)
    growth = scaling.factor * jnp.maximum(lengths, original).astype(jnp.float32) / original - (scaling.factor - 1)
    base = rope.theta * growth ** (rope.rotated / max(rope.rotated - 2, 1))
    return 1 / base[:, None] ** exponents


@jax.named_scope("rope")
def rotary_tables(rope: Rope, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Computes cosine and sine of the rotary angles at `positions`, each float32 `[B, T, H/2]`.

    If the frequencies depend on the length, a row's length is its largest position plus one.
    """
    frequencies = inverse_frequencies(rope, jnp.max(positions, axis=1) + 1 if rope.by_length else None)
    angles = positions[..., None].astype(jnp.float32) * (
        frequencies[:, None] if rope.by_length else frequencies[None, None]
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scaling is None or rope.scaling.attention_factor == 1.0:
        return cos, sin
    size = np.ones((1, 1, rope.head_dim // 2), np.float32)
    size[..., : rope.rotated // 2] = rope.scaling.attention_factor
    return cos * size, sin * size


def tuned(q: Float[Array, "B T N H"], rope: Rope, positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    """Multiplies queries by a factor that grows with their position, if the layer does (`Rope.query_tuning`)."""
    if rope.query_tuning is None:
        return q
    length, strength = rope.query_tuning
    size = 1 + strength * jnp.log1p(((positions + 1) // length).astype(jnp.float32))
    return (q.astype(jnp.float32) * size[:, :, None, None]).astype(q.dtype)


def scaled(q: Float[Array, "B T N H"], scale: float) -> Float[Array, "B T N H"]:
    """Multiplies queries by the model's own scale (`ModelConfig.query_scale`), in float32."""
    return q if scale == 1.0 else (q.astype(jnp.float32) * scale).astype(q.dtype)


def row_positions(
    tokens: int, lengths: Int[Array, "B"], start: Int[Array, "B"] | None = None, *, by_length: bool
) -> Int[Array, "B T"]:
    """Positions of `tokens` right-padded tokens per row.

    Args:
      tokens: number of tokens with the padding, `T`.
      lengths: tokens of each row.
      start: position of each row's first token, 0 by default.
      by_length: the padding repeats the row's last position, so that the largest position tells the row's length.
    """
    steps = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (lengths.shape[0], tokens))
    if by_length:
        steps = jnp.minimum(steps, jnp.maximum(lengths - 1, 0)[:, None])
    return steps if start is None else start[:, None] + steps


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B #T H2"], sin: Float[Array, "#B #T H2"]
) -> Float[Array, "B T N H"]:
    """Rotates channel pairs (i, i + H/2) of queries or keys by their angles, in float32; returns the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, N, H/2] each
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
