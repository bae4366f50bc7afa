"""OSCAR (arXiv 2605.17757): rotations in closed form, by what queries ask of keys and values."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from minikv_jax.methods.quarot import hadamard


def rotations(
    q: Float[Array, "W Q N H"],
    k: Float[Array, "W K S H"],
    v: Float[Array, "W K S H"],
    stored: Bool[Array, "W K S"],
) -> tuple[Float[Array, "H H"], Float[Array, "H H"]]:
    """Computes a layer's rotations of keys and of values from samples of its attention.

    An error `e` of a key costs `E[(q e)^2]`, so the keys' matrix is the second moment of the queries, averaged over KV
    heads. An error of a value costs as much as the value is read: the values' matrix is their second moment, each
    value weighted by `k C k'`, with `C` the second moment of its own head's queries. A head's weights have a mean of 1.
    A rotation is `U H`: eigenvectors of such a matrix, then a Hadamard matrix, which spreads the large ones over all
    channels. The eigenvectors are interleaved by bit reversal, so that every part of `H` gets large and small ones.

    Args:
      q: float32, queries that read the stored tokens, `W` texts of `Q` queries.
      k, v: float32, keys and values of those texts; finite in every slot.
      stored: which of the `S` slots hold a token.

    Returns:
      Orthogonal float32 matrices `R`: the cache holds `k @ R` and `v @ R`.
    """
    texts, queries, heads, dim = q.shape
    grouped = q.reshape(texts, queries, k.shape[1], -1, dim)
    einsum = functools.partial(jnp.einsum, precision="highest")
    asked = einsum("wqkgh,wqkgi->khi", grouped, grouped) / (texts * queries * heads // k.shape[1])
    weights = einsum("wksh,khi,wksi->wks", k, asked, k) * stored
    mean = weights.sum((0, 2), keepdims=True) / jnp.maximum(stored.sum((0, 2), keepdims=True), 1)
    weights = jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1), stored)
    read = einsum("wks,wksh,wksi->hi", weights, v, v)
    return _spread(asked.mean(axis=0)), _spread(read)


def _spread(matrix: Float[Array, "H H"]) -> Float[Array, "H H"]:
    """Eigenvectors of a symmetric matrix, interleaved, times a Hadamard matrix."""
    _, vectors = jnp.linalg.eigh(matrix)
    dim = len(matrix)
    largest_first = vectors[:, ::-1]
    return jnp.matmul(largest_first[:, bit_reversed(dim)], hadamard(dim), precision="highest")


def bit_reversed(size: int) -> np.ndarray:
    """Numbers below `size`, in the order of their bits read backwards; for a power of two, bit reversal."""
    bits = max(size - 1, 1).bit_length()
    return np.argsort([int(f"{number:0{bits}b}"[::-1], 2) for number in range(size)])
