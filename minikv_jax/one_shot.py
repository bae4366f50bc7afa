"""One-shot run: a causal forward pass without a cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.arrays import Contract
from minikv_jax.models.decoder import Llama, check_model
from minikv_jax.models.rotary import row_positions
from minikv_jax.ops.prefill_attention import prefill_attention


def one_shot(model: Llama, ids: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B T V"]:
    """Runs a causal forward pass without a cache, over right-padded rows.

    Args:
      model: the model.
      ids: token ids in `0..V-1`, right-padded; `T` is at most the model's number of positions.
      lengths: tokens of each row, in `0..T`; by default all `T`.

    Returns:
      float32 logits of every token, undefined in the padding.

    Raises:
      ValueError: more tokens than the model has positions, an array of another shape or dtype, a token id or length out
        of range. Under `jit`, values are checked only by `debug_checks`.
    """
    check_model("one_shot", model)
    contract = Contract("one_shot")
    ids = contract.integers("ids", ids, "B T", 0, model.config.vocab_size - 1)
    batch, tokens = ids.shape
    known = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
    known = contract.integers("lengths", known, "B", 0, tokens)
    positions = row_positions(tokens, known, by_length=model.config.rope_by_length)

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        return prefill_attention(q, k, v, known, window=model.window(layer), **model.softmax_options(layer))[0]

    return model.logits(model.forward(ids, positions, attend_layer))
