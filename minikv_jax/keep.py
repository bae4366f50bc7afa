"""Keep: the last step of a layer's prefill, which chooses tokens and makes the layer's cache (MiniKV algorithm 1).

Tokens are selected by their scores (`ops/select.py`), their values may be refitted (`ops/refit.py`), and they are
packed (`ops/compress.py`). Heads that keep all tokens get a cache of their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import meshes
from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.spec import LayerSpec, check_heads_stay_together
from minikv_jax.cache.state import HeadGroups, LayerCache, take_heads
from minikv_jax.methods import calls
from minikv_jax.methods.base import LayerInputs
from minikv_jax.ops.compress import compress, start_eviction
from minikv_jax.ops.refit import refit
from minikv_jax.ops.select import Kept, select
from minikv_jax.outline import outlined


@outlined("capacity", "spec", "implementation")
@jax.named_scope("compress")
def keep(
    inputs: LayerInputs,
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    capacity: LayerCapacity,
    spec: LayerSpec,
    implementation: str | None = None,
) -> tuple[LayerCache | HeadGroups, tuple[Kept, ...]]:
    """Makes a layer's cache with `heavy` top-scored tokens of each prompt.

    Args:
      inputs: the layer's prompts. They may have drafted or repeated tokens after them, which are not kept.
      scores: scores of the tokens.
      lengths: tokens of each prompt.
      heavy: number of top-scored tokens per row.
      capacity: static sizes of the cache.
      spec: the method, and the layer's window and number.
      implementation: implementation of `quantize`.

    Returns:
      The cache, and the tokens that each of its parts holds.
    """
    method, second = spec.method, None
    if method.scores_choose and calls.first_share(method.scorer) < 1:
        second = calls.rescore(method.scorer, inputs._replace(sinks=method.sinks), scores).astype(jnp.float32)

    def choose(q: Array, k: Array, v: Array, scores: Array, second: Array | None, *rows: Any) -> Any:
        seen, lengths, heavy, frequencies = rows
        own = LayerInputs(q, k, v, seen, None, inputs.window, 0, frequencies, method.sinks, inputs.soft_cap)
        if inputs.sink_logits is not None:
            own = own._replace(sink_logits=meshes.own_heads(inputs.sink_logits, 0))
        make = _keep_groups if spec.retrieval_heads else _keep
        return make(own, (scores, second), lengths, heavy, capacity, spec, implementation)

    check_heads_stay_together(spec.method, meshes.size(meshes.MODEL))
    frequencies = inputs.frequencies
    if frequencies is not None:  # the same for all rows, or one per row
        frequencies = jnp.broadcast_to(frequencies, (len(lengths), frequencies.shape[-1]))
    arguments = (inputs.q, inputs.k, inputs.v, scores, second, inputs.lengths, lengths, heavy, frequencies)
    return meshes.call_split(choose, arguments, (2, 2, 2, 1, 1, None, None, None, None))


_Scores = tuple[Float[Array, "B K T"], Float[Array, "B K T"] | None]  # of the first and the second choice


def _keep(
    inputs: LayerInputs,
    scores: _Scores,
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    capacity: LayerCapacity,
    spec: LayerSpec,
    implementation: str | None,
) -> tuple[LayerCache, tuple[Kept]]:
    """Makes the cache of heads that keep equally many tokens."""
    method, v = spec.method, inputs.v
    first, second = scores
    kept = select(first, lengths, heavy, method, capacity.kept, spec.window, second)
    eviction = start_eviction(first, kept, lengths, heavy, method, capacity)
    if method.refit is not None:
        v = refit(inputs, lengths, kept, capacity, spec, implementation)
    return compress(inputs.k, v, kept, capacity, spec, eviction, implementation), (kept,)


def _keep_groups(
    inputs: LayerInputs,
    scores: _Scores,
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    capacity: LayerCapacity,
    spec: LayerSpec,
    implementation: str | None,
) -> tuple[HeadGroups, tuple[Kept, ...]]:
    """Makes a cache of the retrieval heads and one of the others (DuoAttention, arXiv 2410.10819)."""
    kv_heads, groups = inputs.k.shape[2], spec.by_heads(inputs.k.shape[2])
    parts: list[LayerCache] = []
    kept: tuple[Kept, ...] = ()
    for heads, own_spec in groups.items():
        q, k, v = (take_heads(x, heads, kv_heads, axis=2) for x in inputs[:3])
        own = inputs._replace(q=q, k=k, v=v)
        if inputs.sink_logits is not None:
            own = own._replace(sink_logits=take_heads(inputs.sink_logits, heads, kv_heads, axis=0))
        size = capacity.retrieval if heads == spec.retrieval_heads else capacity
        assert size is not None
        own_scores = jax.tree.map(lambda x, heads=heads: take_heads(x, heads, kv_heads, axis=1), scores)
        part, chosen = _keep(own, own_scores, lengths, heavy, size, own_spec, implementation)
        parts.append(part)
        kept += chosen
    return HeadGroups(tuple(parts), tuple(groups), spec), kept
