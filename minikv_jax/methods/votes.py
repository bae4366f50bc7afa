"""Softmax weights of some queries, and what scorers make of votes: their pooling and ranks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import meshes
from minikv_jax.methods.base import LayerInputs
from minikv_jax.models import windows

UNSEEN = 1 << 30  # position of a key that no query sees
_VOTERS = 32  # queries at a time, because their weights over all keys are in memory


def gather_votes(
    inputs: LayerInputs,
    size: int,
    weigh: Callable[[Array, Array, Array], Array],
    join: Callable[[Array, Array], Array],
    at_once: int = _VOTERS,
) -> Float[Array, "B K T"]:
    """Gathers the votes of `size` queries, few at a time.

    Args:
      inputs: the prompt.
      size: number of queries.
      weigh: gets numbers of queries [W], the keys [B, K, T, H] and their positions [B, K, T]. It returns weights
        [B, K, G, W, T], zeros for numbers from `size` on.
      join: gets votes [B, K, T], zero at first, and the weights, and returns the new votes.
      at_once: number of queries at a time.
    """
    batch, tokens, kv_heads, _ = inputs.k.shape
    at = jnp.broadcast_to(jnp.arange(tokens), (batch, kv_heads, tokens))
    voters = min(size, at_once)

    def add(block: Array | int, votes: Array) -> Array:
        return join(votes, weigh(block * voters + jnp.arange(voters), inputs.k.swapaxes(1, 2), at))

    votes = jnp.zeros((batch, kv_heads, tokens), jnp.float32)
    return add(0, votes) if size == voters else lax.fori_loop(0, -(-size // voters), add, votes)


def attention_weights(
    inputs: LayerInputs, queries: Int[Array, "B W"], keys: Float[Array, "B K S H"], positions: Int[Array, "B K S"]
) -> Float[Array, "B K G W S"]:
    """Computes the causal softmax of some of the prompt's queries over some keys; float32.

    Args:
      inputs: the prompt, whose queries are read.
      queries: their positions. A negative one gives zeros.
      keys: the keys.
      positions: their positions in the prompt, or `UNSEEN`.
    """
    rows = jnp.take_along_axis(inputs.q, jnp.maximum(queries, 0)[:, :, None, None], axis=1)
    return causal_weights(inputs, rows, queries, keys, positions)


def causal_weights(
    inputs: LayerInputs,
    q: Float[Array, "B W N H"],
    queries: Int[Array, "B W"],
    keys: Float[Array, "B K S H"],
    positions: Int[Array, "B K S"],
) -> Float[Array, "B K G W S"]:
    """Computes the layer's causal softmax of the queries `q`, at positions `queries`, over some keys; float32."""
    window, (batch, size, heads, dim) = inputs.window, q.shape
    rows = q.reshape(batch, size, keys.shape[1], heads // keys.shape[1], dim)
    logits = jnp.einsum("bwkgh,bksh->bkgws", rows, keys, preferred_element_type=jnp.float32, precision="highest")
    newest, at = queries[:, None, :, None], positions[:, :, None]
    seen = at <= newest  # [B, K, W, S]
    if window is not None:
        seen &= at >= windows.oldest(window, newest)
    logits = logits * dim**-0.5
    if inputs.soft_cap is not None:
        logits = inputs.soft_cap * jnp.tanh(logits / inputs.soft_cap)
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    sinks = None
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.astype(jnp.float32).reshape(keys.shape[1], -1, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    return weights / jnp.where(total == 0, 1.0, total)


def check_odd(pooling_kernel: int) -> None:
    """Raises ValueError for an even number of pooled tokens, which have no middle."""
    if pooling_kernel % 2 == 0:
        raise ValueError(f"pooling_kernel={pooling_kernel}: expected an odd number")


def pool(votes: Float[Array, "B K T"], lengths: Int[Array, "B"], kind: str, kernel: int) -> Float[Array, "B K T"]:
    """Pools the first `lengths` votes of a row by "max" or "mean" (`kind`) over `kernel` tokens, an odd number.

    Returns:
      The pooled votes; those after the first `lengths` as they are.
    """
    pooled_tokens = jnp.arange(votes.shape[-1]) < lengths[:, None, None]
    reach = kernel // 2
    dims, padding = (1, 1, kernel), ((0, 0), (0, 0), (reach, reach))
    if kind == "max":
        inner = jnp.where(pooled_tokens, votes, -jnp.inf)
        pooled = lax.reduce_window(inner, -jnp.inf, lax.max, dims, (1, 1, 1), padding)
    else:
        inner = jnp.where(pooled_tokens, votes, 0.0)
        pooled = lax.reduce_window(inner, 0.0, lax.add, dims, (1, 1, 1), padding) / kernel
    return jnp.where(pooled_tokens, pooled, votes)


def ranks(*scores: Float[Array, "B K T"]) -> tuple[Int[Array, "B K T"], ...]:
    """Ranks tokens by each score: 0 for the highest of a row and KV head. Equal scores rank in order of position."""

    def rank(*scores: Array) -> tuple[Array, ...]:
        order = jnp.argsort(-jnp.stack(scores), axis=-1, stable=True)  # one sort costs less than several
        tokens = jnp.arange(order.shape[-1], dtype=order.dtype)

        def inverse(order: Array) -> Array:
            return jnp.zeros_like(order).at[order].set(tokens, unique_indices=True)

        return tuple(jax.vmap(inverse)(order.reshape(-1, order.shape[-1])).reshape(order.shape))

    return meshes.call_split(rank, scores, (1,) * len(scores))
