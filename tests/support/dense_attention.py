"""Textbook attention, independent of the library's."""

import jax
import jax.numpy as jnp

from minikv_jax.models.decoder import Llama
from minikv_jax.models.windows import Chunk


def dense_attend(model: Llama):
    """Makes a callback for `Llama.forward`: dense causal attention within the layer's window."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        groups = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        cap = model.config.attn_logit_softcapping
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None, :]
        window = model.window(layer)
        if isinstance(window, Chunk):
            numbers = jnp.arange(q.shape[1]) // window.size
            seen = (distance >= 0) & (numbers[:, None] == numbers)
        else:
            seen = (distance >= 0) & (distance < (q.shape[1] if window is None else window))
        weights = jax.nn.softmax(jnp.where(seen[None, None], logits, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    return attend


def dense_logits(model: Llama, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    return model.logits(model.forward(ids, positions, dense_attend(model)))
