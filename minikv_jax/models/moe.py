"""Mixture of experts: a router, and experts that read only the tokens they are given (arXiv 1701.06538).

A token's experts are copies of it, sorted by expert, and computed in blocks that belong to one expert each. A step so
reads the weights of the chosen experts only. `jax.lax.ragged_dot` computes the same, but XLA for CPUs expands it to a
product of every token with every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax import meshes
from minikv_jax.meshes import DATA, MODEL, constrain
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.experts import Experts
from minikv_jax.models.mlp import ACTIVATIONS, MLP
from minikv_jax.models.projections import Reduce, linear, mlp_columns, precision, sum_over_devices

_MOST_BLOCK, _LEAST_BLOCK = 128, 8  # tokens of a block: enough to keep a matmul busy, few enough to waste little


def route(
    logits: Float[Array, "S E"], experts: Experts, correction_bias: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "S k"], Int[Array, "S k"]]:
    """Chooses experts by the router's logits; returns their weights and numbers, the best expert first."""
    scores = logits
    if experts.scoring != "softmax_of_chosen":
        scores = jax.nn.softmax(logits, axis=-1) if experts.scoring == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if correction_bias is None else scores + correction_bias
    if experts.chosen_groups < experts.groups:
        grouped = ranked.reshape(*ranked.shape[:-1], experts.groups, -1)
        two_best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        _, best = lax.top_k(two_best, experts.chosen_groups)
        chosen = jnp.any(best[..., None] == jnp.arange(experts.groups), axis=-2)
        ranked = jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    _, numbers = lax.top_k(ranked, experts.per_token)
    weights = jnp.take_along_axis(scores, numbers, axis=-1)
    if experts.scoring == "softmax_of_chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    if experts.normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * experts.scale, numbers


class ExpertLinear(nnx.Module):
    """A linear layer for each expert: kernels `[E, in, out]`, and biases `[E, out]` if the experts have them."""

    def __init__(self, settings: Experts, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (settings.count, inputs, outputs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * inputs**-0.5)
        self.bias = nnx.Param(jnp.zeros((settings.count, outputs), dtype)) if settings.bias else None

    @property
    def arrays(self) -> LinearWeights:
        return LinearWeights(self.kernel[...], None if self.bias is None else self.bias[...])


class LinearWeights(NamedTuple):
    """Kernels and biases of all experts, or of one."""

    kernel: Float[Array, "*E in out"]
    bias: Float[Array, "*E out"] | None

    def __call__(self, x: Float[Array, "M in"]) -> Float[Array, "M out"]:
        out = jnp.matmul(x, self.kernel, precision=precision(x.dtype))
        return out if self.bias is None else out + self.bias

    def specs(self, kernel: P, bias: P) -> LinearWeights:
        return LinearWeights(kernel, None if self.bias is None else bias)  # pyright: ignore[reportArgumentType]


class ExpertLinears(nnx.Module):
    """The weights of all experts."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.experts is not None
        settings, d = config.experts, config.hidden_size
        self.gate_up_proj = ExpertLinear(settings, d, 2 * settings.intermediate_size, dtype=dtype, rngs=rngs)
        self.down_proj = ExpertLinear(settings, settings.intermediate_size, d, dtype=dtype, rngs=rngs)


class SparseMLP(nnx.Module):
    """A mixture of experts in place of an MLP (`Experts`), with an expert for all tokens if there is one."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.experts is not None
        self.settings = config.experts
        self.groups = mlp_columns(config, config.experts.intermediate_size).groups
        settings, zeros = config.experts, jnp.zeros((config.experts.count,), dtype)
        self.router_proj = linear(dtype, rngs)(config.hidden_size, settings.count, use_bias=settings.router_bias)
        self.correction_bias = nnx.Param(zeros) if settings.correction_bias else None
        self.experts = ExpertLinears(config, dtype=dtype, rngs=rngs)
        size = config.experts.shared_size
        self.shared_expert = MLP(config, size, dtype=dtype, rngs=rngs) if size else None
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"], reduce: Reduce = sum_over_devices) -> Float[Array, "B T D"]:
        batch, tokens, d = x.shape
        weights, numbers = (y.reshape(batch, tokens, -1) for y in self.route(x.reshape(-1, d)))
        stacks = self.experts.gate_up_proj.arrays, self.experts.down_proj.arrays
        if meshes.size(MODEL) * meshes.size(DATA) == 1:
            out = self._of_one_device(x, weights, numbers, *stacks)
        else:
            out = self._of_all_devices(x, weights, numbers, stacks, reduce)
        return out if self.shared_expert is None else out + self.shared_expert(x, reduce)

    def route(self, x: Float[Array, "S D"]) -> tuple[Float[Array, "S k"], Int[Array, "S k"]]:
        """Returns weights, float32, and numbers of the experts of each token."""
        router, bias = self.router_proj, self.correction_bias
        logits = jnp.matmul(x, router.kernel[...], precision="highest", preferred_element_type=jnp.float32)
        logits = logits if router.bias is None else logits + router.bias[...].astype(jnp.float32)
        return route(logits, self.settings, None if bias is None else bias[...].astype(jnp.float32))

    def _of_all_devices(
        self, x: Array, weights: Array, numbers: Array, stacks: tuple[LinearWeights, LinearWeights], reduce: Reduce
    ) -> Float[Array, "B T D"]:
        """Every device has its own part of the hidden channels of all experts, for its own rows."""

        def part(x: Array, weights: Array, numbers: Array, gate_up: LinearWeights, down: LinearWeights) -> Array:
            if down.bias is not None:  # counted once
                down = down._replace(bias=jnp.where(lax.axis_index(MODEL) == 0, down.bias, 0))
            return reduce(self._of_one_device(x, weights, numbers, gate_up, down))

        rows, (gate_up, down) = P(DATA), stacks
        specs = gate_up.specs(P(None, None, MODEL), P(None, MODEL)), down.specs(P(None, MODEL), P())
        run = jax.shard_map(part, in_specs=(rows, rows, rows, *specs), out_specs=rows, check_vma=False)
        return constrain(run(x, weights, numbers, *stacks), DATA)

    def _of_one_device(
        self, x: Array, weights: Array, numbers: Array, gate_up: LinearWeights, down: LinearWeights
    ) -> Float[Array, "B T D"]:
        """Sums over the experts of each token, with the hidden channels that this device has."""
        groups = self.groups * gate_up.kernel.shape[2] // (2 * self.settings.intermediate_size)

        def expert(x: Float[Array, "M D"], stacks: tuple[LinearWeights, LinearWeights]) -> Float[Array, "M D"]:
            with jax.named_scope("gate_up_proj"):
                columns = stacks[0](x)
            gate, up = jnp.split(columns.reshape(x.shape[0], groups, -1), 2, axis=-1)
            hidden = self._hidden(gate, up).reshape(x.shape[0], -1)
            with jax.named_scope("down_proj"):
                return stacks[1](hidden)

        flat, numbers = x.reshape(-1, x.shape[-1]), numbers.reshape(-1, self.settings.per_token)
        weights = weights.reshape(numbers.shape)
        before, after = (weights, None) if self.settings.weighted_inputs else (None, weights)
        out = by_expert(expert, flat, numbers, (gate_up, down), before)
        out = out if after is None else out * after[..., None]
        return jnp.sum(out, axis=1).astype(x.dtype).reshape(x.shape)

    @jax.named_scope("activation")
    def _hidden(self, gate: Array, up: Array) -> Array:
        limit = self.settings.swiglu_limit
        if limit is None:
            return self.activation(gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.settings.swiglu_alpha)


def by_expert(
    function: Callable[[Float[Array, "M D"], Any], Float[Array, "M D"]],
    x: Float[Array, "S D"],
    numbers: Int[Array, "S k"],
    stacks: Any,
    weights: Float[Array, "S k"] | None = None,
) -> Float[Array, "S k D"]:
    """Runs every token through its experts, reading the weights of these experts only.

    Args:
      function: `function(tokens, own)` runs some tokens through an expert; `own` are its arrays.
      x: tokens.
      numbers: numbers of each token's experts, all different.
      stacks: pytree of arrays `[E, ...]`, the experts'.
      weights: factors of the inputs; by default they stay.

    Returns:
      What each expert makes of the token, in the order of `numbers`.
    """
    (tokens, chosen), count = numbers.shape, jax.tree.leaves(stacks)[0].shape[0]
    order = jnp.argsort(numbers.reshape(-1), stable=True)  # copies of the tokens, by expert
    size = _block_size(tokens * chosen, count)
    copies = x[order // chosen]
    if weights is not None:
        copies = (copies * weights.reshape(-1)[order, None]).astype(x.dtype)
    copies = jnp.pad(copies, ((0, size), (0, 0)))
    counts = jnp.bincount(numbers.reshape(-1), length=count)
    blocks = (counts + size - 1) // size
    ends, first_copies = jnp.cumsum(blocks), jnp.cumsum(counts) - counts

    def block(i: Array, out: Array) -> Array:
        number = jnp.searchsorted(ends, i, side="right")
        first = first_copies[number] + (i - (ends - blocks)[number]) * size
        own = jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, number, keepdims=False), stacks)
        # What lies beyond the expert's last copy is computed again by the expert that it belongs to.
        part = function(lax.dynamic_slice_in_dim(copies, first, size), own)
        return lax.dynamic_update_slice_in_dim(out, part.astype(out.dtype), first, axis=0)

    # One token has one copy per expert. That the number of blocks is known spares a GPU a synchronisation per block.
    out = lax.fori_loop(0, chosen if tokens == 1 else ends[-1], block, jnp.zeros_like(copies))
    return out[jnp.argsort(order)].reshape(tokens, chosen, -1)


def _block_size(copies: int, experts: int) -> int:
    """Returns the number of copies in a block, about those of an expert on average."""
    mean = -(-copies // experts)
    return min(max(1 << (mean - 1).bit_length(), _LEAST_BLOCK), _MOST_BLOCK)
