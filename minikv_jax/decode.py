"""Decode and extend: run one new token per row, or several, through a model and its cache.

Each layer appends the tokens, attends and evicts. The functions take a cache value and return a new one, and work
inside `jax.jit`. The model projects and rotates (`Llama.forward`); this module decides what attention reads and which
tokens stay.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax.arrays import Contract
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.state import HeadGroups, LayerCache
from minikv_jax.models.decoder import Llama, check_model
from minikv_jax.models.projections import Reduce, sum_over_devices
from minikv_jax.models.rotary import row_positions
from minikv_jax.ops.all_reduce import all_reduce
from minikv_jax.ops.append import append
from minikv_jax.ops.decode_attention import decode_attention, decode_attention_weights
from minikv_jax.ops.dispatch import check_implementation
from minikv_jax.ops.evict import evict
from minikv_jax.ops.extend_attention import extend_attention
from minikv_jax.outline import outlined


def check_same_model(model: Llama, cache: KVCache) -> None:
    """Raises ValueError unless `cache` has the layers, heads and dtype of `model`."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}: expected a KVCache")
    parts, config = cache.layers[0].parts, model.config
    tail = parts[0].tail.k
    sizes = (len(cache.layers), sum(part.tail.k.shape[1] for part in parts), tail.shape[3])
    expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    if sizes != expected:
        raise ValueError(f"cache has (layers, KV heads, head dim) {sizes}, the model {expected}")
    if tail.dtype != model.dtype:
        raise ValueError(f"cache has dtype {tail.dtype}, the model {jnp.dtype(model.dtype)}: expected the same")


def _contract(function: str, model: Llama, cache: KVCache, implementation: str | None) -> Contract:
    check_implementation(implementation)
    check_model(function, model)
    check_same_model(model, cache)
    return Contract(function, B=cache.length.shape[0])


def _check_positions(contract: Contract, model: Llama, cache: KVCache, new: Array) -> None:
    positions, seen = model.config.max_position_embeddings, cache.length
    text = f"has seen {{seen}} tokens and gets {{new}}: the model has {positions} positions"
    contract.holds(seen + new <= positions, text, seen=seen, new=new)


def decode(
    model: Llama,
    cache: KVCache,
    token: Int[Array, "B"],
    active: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs one decode step: appends a token to each active row, attends over the cache, then evicts.

    Full tails are packed on the way (MiniKV section 3.3), and packed tokens are read as they are stored (section 3.4).

    Args:
      model: the model that the cache was made for.
      cache: returned by `prefill`, `decode` or `extend`. To update it in place, donate it to your `jax.jit`.
      token: one token id per row, in `0..V-1`.
      active: 1 for rows that take part, 0 for rows whose cache stays as it is.
      implementation: "xla", "pallas" or "cuda", for all ops; by default the fastest one recorded for this GPU that
        supports the inputs.

    Returns:
      The final hidden states in the model's dtype (`model.logits` turns them into logits), and the new cache.

    Raises:
      ValueError: a cache of another model or dtype, an array of another shape or dtype, a row without room, a token
        outside the vocabulary, a position beyond the model's. Under `jit`, values are checked only by `debug_checks`.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    contract = _contract("decode", model, cache, implementation)
    token = contract.integers("token", token, "B", 0, model.config.vocab_size - 1)
    active = contract.integers("active", active, "B", 0, 1)
    _check_positions(contract, model, cache, active)
    positions = cache.length[:, None]
    layers: list[LayerCache | HeadGroups] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        how: dict[str, Any] = {"implementation": implementation, **model.softmax_options(layer)}
        out, new = decode_layer(cache.layers[layer], q, k, v, active, positions, **how)
        layers.append(new)
        return out

    hidden = model.forward(token[:, None], positions, attend, _reduce(model, implementation))
    return hidden[:, 0], KVCache(tuple(layers), cache.length + active)


def _reduce(model: Llama, implementation: str | None) -> Reduce:
    """Selects the sum over devices that ends attention and the MLP of a split model."""
    if model.mesh is None:
        return sum_over_devices
    return functools.partial(all_reduce, mesh=model.mesh, implementation=implementation)


@outlined("implementation", "soft_cap", in_place=True)
def decode_layer(
    layer: LayerCache | HeadGroups,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    active: Int[Array, "B"],
    positions: Int[Array, "B 1"],
    implementation: str | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], LayerCache | HeadGroups]:
    """Runs one layer's part of a decode step. Returns its attention output, and its cache with the new token."""
    how: dict[str, Any] = {"soft_cap": soft_cap, "implementation": implementation}
    if isinstance(layer, HeadGroups):

        def decode_part(part: LayerCache, q: Array, k: Array, v: Array, sinks: Array | None) -> Any:
            return decode_layer(part, q, k, v, active, positions, sink_logits=sinks, **how)

        return layer.attend(decode_part, q, k, v, sink_logits)
    how["sink_logits"] = sink_logits
    new = append(layer, k, v, active, positions, implementation)
    state = new.eviction
    if state is not None and state.scores is not None:
        out, weights = decode_attention_weights(q[:, 0], new, **how)
    else:
        out, weights = decode_attention(q[:, 0], new, positions[:, 0], **how), None
    return out[:, None], new if state is None else evict(new, state, weights, active)


def extend(
    model: Llama,
    cache: KVCache,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs several new tokens per row: the next turn of a chat, or a teacher-forced continuation.

    The new tokens see the cache as it is stored, and each other in full precision. Then they enter the tail, and full
    tails are packed (MiniKV section 3.3). Without quantisation the result equals a run of the whole sequence at once.
    A method with `evict_every` takes the tokens one by one, each as a decode step.

    Args:
      model: the model that the cache was made for.
      cache: returned by `prefill`, `decode` or `extend`. To update it in place, donate it to your `jax.jit`.
      ids: token ids in `0..V-1`, right-padded.
      lengths: new tokens per row, in `0..T`.
      implementation: "xla", "pallas" or "cuda", for all ops; by default the fastest one recorded for this GPU that
        supports the inputs.

    Returns:
      The final hidden states in the model's dtype, undefined in the padding, and the new cache.

    Raises:
      ValueError: as `decode`, or a length that is not in `0..T`.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    contract = _contract("extend", model, cache, implementation)
    ids = contract.integers("ids", ids, "B T", 0, model.config.vocab_size - 1)
    lengths = contract.integers("lengths", lengths, "B", 0, ids.shape[1])
    _check_positions(contract, model, cache, lengths)
    if cache.layers[0].eviction is not None:
        return _extend_by_steps(model, cache, ids, lengths, implementation)
    positions = row_positions(ids.shape[1], lengths, cache.length, by_length=model.config.rope_by_length)
    layers: list[LayerCache | HeadGroups] = []

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        how: dict[str, Any] = {"implementation": implementation, **model.softmax_options(layer)}
        out, new = extend_layer(cache.layers[layer], q, k, v, lengths, positions, **how)
        layers.append(new)
        return out

    hidden = model.forward(ids, positions, attend)
    return hidden, KVCache(tuple(layers), cache.length + lengths)


def extend_layer(
    layer: LayerCache | HeadGroups,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    positions: Int[Array, "B T"],
    implementation: str | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache | HeadGroups]:
    """Runs one layer's part of `extend`. Returns its attention output, and its cache with the new tokens."""
    how: dict[str, Any] = {"soft_cap": soft_cap, "implementation": implementation}
    if isinstance(layer, HeadGroups):

        def extend_part(part: LayerCache, q: Array, k: Array, v: Array, sinks: Array | None) -> Any:
            return extend_layer(part, q, k, v, lengths, positions, sink_logits=sinks, **how)

        return layer.attend(extend_part, q, k, v, sink_logits)
    out = extend_attention(q, k, v, layer, lengths, positions, sink_logits=sink_logits, **how)
    return out, append(layer, k, v, lengths, positions, implementation)


def _extend_by_steps(
    model: Llama, cache: KVCache, ids: Array, lengths: Array, implementation: str | None
) -> tuple[Float[Array, "B T D"], KVCache]:
    def step(cache: KVCache, column: tuple[Array, Array]) -> tuple[KVCache, Array]:
        token, number = column
        active = (number < lengths).astype(jnp.int32)
        hidden, cache = decode(model, cache, token, active, implementation)
        return cache, hidden

    cache, hidden = lax.scan(step, cache, (ids.T, jnp.arange(ids.shape[1])))
    return hidden.swapaxes(0, 1), cache
