"""Inspects what methods keep of a prompt per layer and head: the arrays behind `minikv inspect`.

The full-cache model continues the prompt greedily. The fraction of these next tokens' attention to the prompt that
falls on kept tokens measures a method's choice with data that no scorer has seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.cache.capacity import LayerCapacity, capacities
from minikv_jax.cache.state import LayerCache
from minikv_jax.evaluation.decoding import padded_length
from minikv_jax.evaluation.measure import check_case
from minikv_jax.evaluation.task import Case
from minikv_jax.generate import generate
from minikv_jax.layerwise import PromptLayer, compress_layers, look_ahead, prefill_layers
from minikv_jax.methods import contracts
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import SCORERS
from minikv_jax.models import windows
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.windows import Window
from minikv_jax.ops.select import Kept
from minikv_jax.ops.shapes import Scaling
from minikv_jax.prompts import bucket_length


@dataclasses.dataclass(frozen=True)
class Inspection:
    """One method on one prompt of `T` tokens, as NumPy arrays over `L` layers, `K` KV heads and `H` channels.

    Attributes:
      kept: bool `[L, K, T]`, the prompt tokens that the cache holds.
      packed_tokens: int `[L]`, kept tokens per head that are stored as codes; the others are in full precision.
      layer_bytes: int `[L]`, bytes allocated for the padded prompt and the new tokens.
      attention_kept: float32 `[L, K]`, fraction of the next tokens' attention to the prompt that falls on kept tokens;
        1 if a sliding window hides the prompt from them.
      key_error, value_error: float32 `[L, K, H]`, RMS over the packed tokens of the decoded minus the original numbers,
        in the model's own basis; with a refit, its change of the values is included. None if the method does not
        quantise, NaN in a layer without packed tokens.
      key_rms, value_rms: float32 `[L, K, H]`, RMS of the original numbers over the same tokens.
    """

    kept: np.ndarray
    packed_tokens: np.ndarray
    layer_bytes: np.ndarray
    attention_kept: np.ndarray
    key_error: np.ndarray | None
    value_error: np.ndarray | None
    key_rms: np.ndarray | None
    value_rms: np.ndarray | None

    @property
    def kept_tokens(self) -> np.ndarray:
        """Number of prompt tokens held by each layer and KV head, int `[L, K]`."""
        return self.kept.sum(axis=-1)

    @property
    def layer_key_error(self) -> np.ndarray | None:
        """RMS error of each layer's keys relative to their RMS over heads and channels, float32 `[L]`."""
        return _relative(self.key_error, self.key_rms)

    @property
    def layer_value_error(self) -> np.ndarray | None:
        """RMS error of each layer's values relative to their RMS over heads and channels, float32 `[L]`."""
        return _relative(self.value_error, self.value_rms)


def inspect(
    model: Llama,
    prompt: Sequence[int],
    methods: Mapping[str, Method],
    max_new_tokens: int = 32,
    implementation: str | None = None,
) -> dict[str, Inspection]:
    """Inspects what each method keeps of a prompt after the prefill.

    Args:
      model: the model.
      prompt: token ids.
      methods: the methods by name.
      max_new_tokens: maximum number of tokens that the full-cache model generates for `attention_kept`, and the room in
        the caches.
      implementation: of the attention ops: "xla", "pallas", "cuda", or None for the fastest.

    Returns:
      An inspection per method.

    Raises:
      ValueError: the prompt or a method does not fit the model, or a scorer returns NaN.
      NotImplementedError: a method with retrieval heads.
    """
    case = Case("the prompt", tuple(prompt), max_new_tokens=max_new_tokens)
    check_case(model.config, case, max_new_tokens)
    for name, method in methods.items():
        contracts.check(method, model.config)
        if method.retrieval_heads:
            raise NotImplementedError(f"method {name!r}: a cache with retrieval heads cannot be inspected")
    ids, length = _padded(prompt, padded_length(model.config, case))
    sums = any(method.scorer.needs_column_sums for method in methods.values())
    hidden, layers = prefill_layers(model, ids, length, sums, implementation)
    later = _later_queries(model, prompt, max_new_tokens, implementation)
    run = functools.partial(_inspect, model.config, later=later, length=length)
    inspections = {}
    for name, method in methods.items():
        inputs, seen = look_ahead(model, method, (ids, length), hidden, layers, implementation)
        sizes = capacities(model.config, method, ids.shape[1], max_new_tokens)
        arrays = run(method, layers=inputs, seen=seen, sizes=sizes, implementation=implementation)
        arrays = jax.device_get(arrays)
        if not arrays.pop("scored"):
            raise ValueError(
                f"method {name!r}: its scorer {SCORERS.name_of(method.scorer)!r} gives NaN for tokens of the prompt"
            )
        inspections[name] = Inspection(**arrays | {"kept": arrays["kept"][..., : len(prompt)]})
    return inspections


class _Later(NamedTuple):
    """Queries of the tokens after the prompt, and the keys that they see, per layer."""

    q: list[Float[Array, "M N H"]]
    k: list[Float[Array, "S K H"]]
    queries: Int[Array, ""]  # number of valid ones among the M


def _padded(ids: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    row = np.zeros((1, size), np.int32)
    row[0, : len(ids)] = ids
    return row, np.array([len(ids)], np.int32)


def _later_queries(model: Llama, prompt: Sequence[int], count: int, implementation: str | None) -> _Later:
    """Computes the queries of the text that the full-cache model generates next, up to its end of sequence."""
    result = generate(model, [prompt], method="full", max_new_tokens=count, implementation=implementation)
    generated = result.tokens[0, : int(result.lengths[0])].tolist()
    padded = bucket_length(len(prompt) + count, model.config.max_position_embeddings)
    ids, length = _padded([*prompt, *generated], padded)
    _, layers = prefill_layers(model, ids, length, False, implementation)
    q = [layer[0][0, len(prompt) : len(prompt) + count] for layer in layers]
    return _Later(q, [layer[1][0] for layer in layers], jnp.int32(len(generated)))


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("sizes", "implementation"))
def _inspect(
    model: ModelConfig,
    method: Method,
    *,
    layers: list[PromptLayer],
    later: _Later,
    length: Int[Array, "1"],
    seen: Int[Array, "1"],
    sizes: tuple[LayerCapacity, ...],
    implementation: str | None,
) -> dict[str, Any]:
    """Computes the fields of `Inspection`, with `kept` over the padded prompt."""
    cache, parts, scored = compress_layers(model, method, layers, length, seen, sizes, implementation)
    kept = [of_all_heads for (of_all_heads,) in parts]
    maps = [_kept_map(choice, layer[1].shape[1]) for choice, layer in zip(kept, layers, strict=True)]
    shares = [
        attention_share(
            *(kept_tokens, q, k, length[0], later.queries, model.window(number), model.attn_logit_softcapping),
            layer.sink_logits,
        )
        for number, (kept_tokens, q, k, layer) in enumerate(zip(maps, later.q, later.k, layers, strict=True))
    ]
    fields = {
        "scored": scored[0],
        "kept": jnp.stack(maps),
        "packed_tokens": jnp.stack([part.packed.length[0] for part in cache.parts]),
        "layer_bytes": np.array([layer.nbytes for layer in cache.layers]),
        "attention_kept": jnp.stack(shares),
    }
    names = ("key_error", "value_error", "key_rms", "value_rms")
    if method.quantizer is None:
        return fields | dict.fromkeys(names)
    errors = [
        _errors(layer, choice, k, v) for layer, choice, (_, k, v, *_) in zip(cache.parts, kept, layers, strict=True)
    ]
    return fields | {name: jnp.stack(values) for name, values in zip(names, zip(*errors, strict=True), strict=True)}


def _kept_map(kept: Kept, tokens: int) -> Bool[Array, "K T"]:
    positions = kept.positions[0]
    heads = jnp.arange(positions.shape[0])[:, None]
    return jnp.zeros((positions.shape[0], tokens), bool).at[heads, positions].set(True, mode="drop")


def attention_share(
    kept: Bool[Array, "K T"],
    q: Float[Array, "M N H"],
    k: Float[Array, "S K H"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    window: Window | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
) -> Float[Array, "K"]:
    """Computes the fraction of attention to the prompt that falls on kept keys.

    Weights are summed over the queries and over the heads of a group before the fraction is taken.

    Args:
      kept: which of the `T` prompt tokens are kept, bool `[K, T]`.
      q: queries `[M, N, H]`, the first `count` of which are used.
      k: keys `[S, K, H]` of all positions from 0, including the queries' own; `S` is at least `T`.
      first: position of the first query.
      count: number of queries.
      window: sliding window in tokens, or chunk. A query sees the keys up to its own position within it.
      soft_cap, sink_logits: as in `prefill_attention`.

    Returns:
      Fractions `[K]`, float32; 1 if no query sees the prompt.
    """
    queries, heads, dim = q.shape
    keys, kv_heads = k.shape[:2]
    q = q.reshape(queries, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("mkgh,skh->kgms", q, k, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
    position, key = first + jnp.arange(queries)[:, None], jnp.arange(keys)
    seen = key <= position
    if window is not None:
        seen &= key >= windows.oldest(window, position)
    logits = Scaling(dim**-0.5, soft_cap).logits(logits)
    logits = jnp.where(seen, logits, -jnp.inf)
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :keys]
    asked = jnp.arange(queries)[:, None] < count
    weights = jnp.sum(jnp.where(asked & (key < first), weights, 0.0), axis=(1, 2))  # [K, S]
    size = min(keys, kept.shape[1])
    on_kept = jnp.sum(jnp.where(kept[:, :size], weights[:, :size], 0.0), axis=-1)
    total = jnp.sum(weights, axis=-1)
    return jnp.where(total > 0, on_kept / jnp.where(total > 0, total, 1.0), 1.0)


def _errors(
    layer: LayerCache, kept: Kept, k: Float[Array, "1 S K H"], v: Float[Array, "1 S K H"]
) -> tuple[Array, Array, Array, Array]:
    """Computes the RMS over packed tokens of the errors of keys and values, and of the originals; float32 `[K, H]`."""
    slots = jnp.arange(layer.packed.capacity)
    positions = jnp.take(kept.positions, layer.method.sinks + slots, axis=-1, mode="clip")  # [1, K, P]
    valid = (slots < layer.packed.length[:, None])[:, None, :, None]

    def rms(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.where(valid, x**2, 0.0), axis=2) / layer.packed.length[0])[0]

    stored_k, stored_v = layer.packed_tokens(0, layer.packed.capacity, jnp.float32)
    back_k, back_v = layer.spec.from_basis(stored_k, "keys"), layer.spec.from_basis(stored_v, "values")
    k, v = (
        jnp.take_along_axis(x.swapaxes(1, 2), positions[..., None], axis=2, mode="clip").astype(jnp.float32)
        for x in (k, v)
    )
    return rms(back_k - k), rms(back_v - v), rms(k), rms(v)


def _relative(error: np.ndarray | None, rms: np.ndarray | None) -> np.ndarray | None:
    if error is None or rms is None:
        return None
    squares = [np.sum(np.square(x, dtype=np.float64), axis=(1, 2)) for x in (error, rms)]
    return np.sqrt(squares[0] / squares[1])
