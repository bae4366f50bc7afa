"""Lookahead: puts tokens after a prompt, whose queries then vote for the prompt's tokens (arXiv 2505.20334).

`prefill` first compresses the prompt as if there were no lookahead, and drafts with that cache. Then it runs the prompt
once more, with the draft after it. This costs a second prefill and one decode step per drafted token. Beside the
caches, one layer's full K and V are in memory at a time.

A scorer with `needs_repeat` has no draft. The prompt itself follows the prompt, in one prefill of twice the length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import meshes
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.decode import decode
from minikv_jax.models.decoder import Llama


class Prompt(NamedTuple):
    """Right-padded prompts, perhaps with further tokens right after each, drafted or the prompt's own again.

    Attributes:
      ids: int32, token ids.
      lengths: int32, tokens of the prompts.
      seen: int32, tokens of the prompts and those after them.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    seen: Int[Array, "B"]


def likeliest(
    model: Llama, hidden: Float[Array, "B D"], active: Int[Array, "B"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns each active row's likeliest token, and which rows go on after it; zeros for the other rows."""
    token = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32) * active
    ended = jnp.isin(token, jnp.asarray(model.config.eos_token_ids, jnp.int32))
    return token, active * (1 - ended.astype(jnp.int32))


def draft(
    model: Llama, hidden: Float[Array, "B D"], cache: KVCache, tokens: int, implementation: str | None = None
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    """Generates `tokens` tokens greedily from a compressed cache.

    Args:
      model: the model.
      hidden: final hidden state of each row's last token.
      cache: the compressed prompt, with room for `tokens` more.
      tokens: most tokens per row; an end-of-sequence token ends a row earlier.
      implementation: of the ops.

    Returns:
      The tokens, zero beyond a row's end, and their number per row.
    """

    def step(state: tuple[Array, KVCache, Array], _: None) -> tuple[tuple[Array, KVCache, Array], tuple[Array, Array]]:
        hidden, cache, active = state
        token, going = likeliest(model, hidden, active)
        hidden, cache = decode(model, cache, token, active, implementation)
        placed = meshes.constrain(hidden, meshes.DATA), meshes.constrain(cache, *meshes.AXES), going
        return placed, (token, active)

    active = jnp.ones_like(cache.length)
    _, (drafted, counted) = lax.scan(step, (hidden, cache, active), length=tokens)
    return drafted.T, counted.sum(axis=0)


def join(
    ids: Int[Array, "B T"], lengths: Int[Array, "B"], further: Int[Array, "B M"], counts: Int[Array, "B"], limit: int
) -> Prompt:
    """Puts the first `counts` of each row's further tokens, a draft or the prompt again, right after its prompt.

    The array has at most `limit` tokens (the model's positions).
    """
    tokens, most = ids.shape[1], further.shape[1]
    size = min(tokens + most, limit)
    after = jnp.arange(size) - lengths[:, None]  # 0 for the first further token
    wide = jnp.pad(ids, [(0, 0), (0, size - tokens)])
    both = jnp.where(after < 0, wide, jnp.take_along_axis(further, jnp.clip(after, 0, most - 1), axis=1))
    return Prompt(jnp.where(after < counts[:, None], both, 0), lengths, lengths + counts)
