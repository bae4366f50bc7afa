"""Window votes: column sums of the causal softmax map over each row's last queries (SnapKV section 4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax.meshes import heads_at
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.votes import attention_weights, gather_votes
from minikv_jax.models import windows
from minikv_jax.models.windows import Window
from minikv_jax.ops import dispatch
from minikv_jax.ops.shapes import prompt_contract, refuse_sinks, scaling, soft_cap_value

Votes = tuple[Float[Array, "B K T"], ...]


@jax.named_scope("window_votes")
def window_votes(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    sizes: Sequence[int],
    *,
    power: int = 1,
    soft_cap: float | None = None,
    window: Window | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Votes:
    """Sums the causal softmax map, to a power, over the last queries of each row, for windows of several sizes.

    Args:
      q, k: queries and keys after RoPE, right-padded; float32, bfloat16 or float16.
      lengths: valid tokens per row, in `0..T`. The padding may hold anything, including NaN.
      sizes: numbers of last queries. A row with fewer takes all its queries.
      power: each weight is taken to this power, at least 1.
      soft_cap, window, sink_logits: as in `prefill_attention`. "cuda" computes neither caps and sinks nor chunks.
      implementation: "xla", "pallas" (plain JAX too) or "cuda"; by default the fastest recorded for this GPU that
        supports the inputs.

    Returns:
      For each size, the float32 sums over the queries and the `G` query heads of each KV head, zero in the padding.

    Raises:
      ValueError: an array of another shape or dtype, a length out of range, a size, power or window below 1.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    q, k, _, lengths, sinks = prompt_contract("window_votes", q, k, k, lengths, sink_logits)
    windows.check(window)
    if not sizes:
        raise ValueError(f"sizes={sizes}: expected at least one")
    checks.at_least(1, power=power, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    batch, tokens, heads, head_dim = q.shape
    runs = tuple(sorted({min(size, tokens) for size in sizes}))
    shape = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": k.shape[2], "head_dim": head_dim}
    votes = dispatch.run(
        "window_votes",
        implementation,
        shape | {"queries": runs[-1]},
        _IMPLEMENTATIONS,
        *(q, k, lengths, sinks, runs, power, soft_cap_value(soft_cap), window),
        heads=(2, 2, None, 1),
        outputs=heads_at(1),
    )
    return tuple(votes[runs.index(min(size, tokens))] for size in sizes)


def _xla(
    q: Array,
    k: Array,
    lengths: Array,
    sinks: Array | None,
    sizes: tuple[int, ...],
    power: int,
    soft_cap: float | None,
    window: Window | None,
) -> Votes:
    own_sinks = None if sinks is None else sinks[0]  # the same in every row
    inputs = LayerInputs(q, k, k, lengths, window=window, soft_cap=soft_cap, sink_logits=own_sinks)
    runs = [_run(inputs, newest, end, power) for newest, end in zip((0, *sizes), sizes, strict=False)]
    return tuple(itertools.accumulate(runs))


def _run(inputs: LayerInputs, newest: int, end: int, power: int) -> Float[Array, "B K T"]:
    """Sums over each row's queries number `newest` to `end`, counted backwards from 0, its last one."""

    def weigh(number: Array, keys: Array, at: Array) -> Array:
        back = newest + number
        positions = jnp.where(back < end, inputs.lengths[:, None] - 1 - back, -1)
        return attention_weights(inputs, positions, keys, at)

    return gather_votes(inputs, end - newest, weigh, lambda votes, new: votes + jnp.sum(new**power, axis=(2, 3)))


def _cuda(
    q: Array,
    k: Array,
    lengths: Array,
    sinks: Array | None,
    sizes: tuple[int, ...],
    power: int,
    soft_cap: float | None,
    window: Window | None,
) -> Votes:
    refuse_sinks("window_votes", "cuda", sinks)
    scale = scaling(None, soft_cap, q.shape[3]).without_soft_cap("window_votes", "cuda")
    kernel = dispatch.package("cuda").window_votes
    return kernel(q, k, lengths, sizes, scale=scale, power=power, window=windows.for_kernels(window))


_IMPLEMENTATIONS = {"xla": _xla, "pallas": _xla, "cuda": _cuda}
