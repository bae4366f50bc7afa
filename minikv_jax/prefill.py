"""Prefill: MiniKV's algorithm 1 for each layer: attend, score, budget, select, compress.

The steps are functions of one layer's arrays. The compiled prefill (`prefill`), your own models (`prefill_layer`) and
evaluation's run with one program per layer (`layerwise.py`) all use them:

1. `attend`         causal attention and, if the scorer needs them, its column sums (`ops/prefill_attention.py`);
2. `score`          a score for every key (`methods/`), perhaps from votes (`ops/window_votes.py`);
3. `heavy_tokens`   the number of top-scored tokens that each layer keeps (`cache/budgets.py`);
4. `keep`           the kept tokens, their values and their cache (`keep.py`).

A method with `lookahead` or a scorer that repeats the prompt runs them twice (`lookahead.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import checks, meshes
from minikv_jax.arrays import Contract
from minikv_jax.cache.budgets import budgets_from_scores, layer_budgets
from minikv_jax.cache.capacity import LayerCapacity, capacities, layer_capacity
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import HeadGroups, LayerCache
from minikv_jax.keep import keep
from minikv_jax.lookahead import Prompt, draft, join
from minikv_jax.methods import calls, contracts
from minikv_jax.methods.base import MAX_TOKENS, LayerInputs, ScoredBudget
from minikv_jax.methods.lookup import resolve
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import CHUNK_TOKENS, Llama, check_model
from minikv_jax.models.rotary import inverse_frequencies, row_positions
from minikv_jax.ops.dispatch import check_implementation
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.shapes import inputs_contract
from minikv_jax.ops.window_votes import window_votes
from minikv_jax.outline import outlined


def layer_inputs(model: Llama, layer: int, q: Array, k: Array, v: Array, lengths: Array) -> LayerInputs:
    """Adds to a layer's arrays what scorers may read of the model (`LayerInputs`)."""
    frequencies = jnp.asarray(inverse_frequencies(model.config.rope(layer), lengths))
    more: dict[str, Any] = {"output_projection": model.output_projection(layer), **model.softmax_options(layer)}
    return LayerInputs(q, k, v, lengths, None, model.window(layer), jnp.int32(layer), frequencies, **more)


def attend(
    inputs: LayerInputs, method: Method, implementation: str | None = None
) -> tuple[Float[Array, "B T N H"], LayerInputs]:
    """Step 1: causal attention. Also returns the inputs, with column sums if the scorer needs them."""
    out, sums = _attend(inputs, method.scorer.needs_column_sums, implementation)
    return out, inputs._replace(column_sums=sums)


@outlined("with_scores", "implementation")
def _attend(inputs: LayerInputs, with_scores: bool, implementation: str | None) -> Any:
    options = inputs.attention_options
    return prefill_attention(*inputs[:4], **options, with_scores=with_scores, implementation=implementation)


@outlined("method", "implementation")
@jax.named_scope("score")
def score(inputs: LayerInputs, method: Method, implementation: str | None = None) -> Float[Array, "B K T"]:
    """Step 2: float32 scores of all tokens; zero if nothing is evicted. Counts the votes that the scorer reads."""
    batch, tokens, kv_heads, _ = inputs.k.shape
    if method.keeps_all and inputs.window is None:
        return jnp.zeros((batch, kv_heads, tokens), jnp.float32)
    if sizes := calls.vote_windows(method.scorer):
        options: Any = inputs.attention_options | {"power": method.scorer.vote_power, "implementation": implementation}
        votes = window_votes(inputs.q, inputs.k, inputs.lengths, sizes, **options)
        inputs = inputs._replace(votes=votes)
    return calls.score(method.scorer, inputs._replace(sinks=method.sinks)).astype(jnp.float32)


def heavy_tokens(
    method: Method, num_layers: int, lengths: Int[Array, "B"], scores: Sequence[Float[Array, "B K T"]] = ()
) -> Sequence[Int[Array, "B"]]:
    """Step 3: number of top-scored tokens to keep, per layer and row. Only a `ScoredBudget` reads `scores`."""
    if isinstance(method.budget, ScoredBudget):
        return list(budgets_from_scores(method, scores, lengths))
    return [budget.granted(lengths) for budget in layer_budgets(method, num_layers)]


class _Plan(NamedTuple):
    """Settings of a prefill that are the same for all rows."""

    method: Method
    capacities: tuple[LayerCapacity, ...]
    implementation: str | None


class _Rows(NamedTuple):
    """A cache of all rows. A prefill of some of them, from `start` on, writes each layer into it as it is made."""

    cache: KVCache
    start: Array


def prefill(
    model: Llama,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    method: str | Method,
    max_new_tokens: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs right-padded prompts and compresses their cache with `method` (MiniKV algorithm 1).

    Each layer is compressed right after its attention, so only one layer's full K and V exist at a time, unless a
    `ScoredBudget` needs all layers' scores first. A large batch runs in chunks of rows, about `CHUNK_TOKENS` tokens.

    Args:
      model: the model.
      ids: token ids in `0..V-1`, right-padded.
      lengths: tokens of each row, in `1..T`.
      method: a `Method` or a name.
      max_new_tokens: tokens per row that the cache will have room for, at least 0.
      implementation: "xla", "pallas" or "cuda", for all ops; by default the fastest recorded for this GPU.

    Returns:
      The final hidden state of each row's last token, in the model's dtype, and the cache.

    Raises:
      ValueError: a method that does not fit the model, an array of another shape or dtype, a token id or length out of
        range. Under `jit`, values are checked only by `debug_checks`.
      NotImplementedError: an `implementation` that cannot run this case, with the reason.
    """
    check_implementation(implementation)
    check_model("prefill", model)
    contract = Contract("prefill")
    ids = contract.integers("ids", ids, "B T", 0, model.config.vocab_size - 1)
    lengths = contract.integers("lengths", lengths, "B", 1, ids.shape[1])
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 0, MAX_TOKENS)
    method = resolve(method)
    contracts.check(method, model.config)
    prompt = _with_more(model, ids, lengths, method, implementation)
    plan = _Plan(method, capacities(model.config, method, ids.shape[1], max_new_tokens), implementation)
    meshes.check_multiple("rows", ids.shape[0], meshes.DATA, meshes.size(meshes.DATA))
    own_rows = ids.shape[0] // meshes.size(meshes.DATA)  # of each device along the axis "data"
    chunks = -(-own_rows // max(CHUNK_TOKENS // prompt.ids.shape[1], 1))
    return _prefill_rows(model, prompt, plan) if chunks <= 1 else _prefill_chunks(model, prompt, plan, chunks)


def _with_more(model: Llama, ids: Array, lengths: Array, method: Method, implementation: str | None) -> Prompt:
    """Puts after each prompt itself, or what is drafted with the cache that the method makes without lookahead."""
    if not method.runs_twice:
        return Prompt(ids, lengths, lengths)
    positions = model.config.max_position_embeddings
    longest = method.longest_prompt(positions)
    text = f"has {{length}} tokens: the method and the model's {positions} positions leave room for {longest}"
    Contract("prefill").holds(lengths <= longest, text, length=lengths)
    if not method.lookahead:
        return join(ids, lengths, ids, lengths, positions)
    plain = dataclasses.replace(method, lookahead=0)
    hidden, cache = prefill(model, ids, lengths, plain, method.lookahead, implementation)
    drafted, counts = draft(model, hidden, cache, method.lookahead, implementation)
    return join(ids, lengths, drafted, counts, positions)


def _prefill_chunks(model: Llama, prompt: Prompt, plan: _Plan, chunks: int) -> tuple[Float[Array, "B D"], KVCache]:
    """Prefills some rows of each device at a time."""
    batch, devices = prompt.ids.shape[0], meshes.size(meshes.DATA)
    own_rows = batch // devices
    rows = -(-own_rows // chunks)

    def chunk(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        hidden, cache = carry
        # The last chunk is moved back to end with the batch. Rows that it repeats give the same result.
        start = jnp.minimum(i * rows, own_rows - rows)
        own = Prompt(*(meshes.read_rows(x, start, rows) for x in prompt))
        new, cache = _prefill_rows(model, own, plan, _Rows(cache, start))
        return meshes.write_rows(hidden, new, start), KVCache(cache.layers, prompt.lengths)

    some = devices * rows
    shapes = jax.eval_shape(lambda *few: _prefill_rows(model, Prompt(*few), plan), *(x[:some] for x in prompt))
    hidden, cache = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), shapes)
    zeros = meshes.constrain(hidden, meshes.DATA), meshes.constrain(cache, *meshes.AXES)
    return lax.fori_loop(0, chunks, chunk, zeros)


def _prefill_rows(
    model: Llama, prompt: Prompt, plan: _Plan, into: _Rows | None = None
) -> tuple[Float[Array, "B D"], KVCache]:
    """Prefills all rows at once. Each layer is written to `into`, if given, before the next one runs."""
    method, num_layers = plan.method, model.config.num_hidden_layers
    ids, lengths, seen = prompt
    waits = isinstance(method.budget, ScoredBudget)
    budgets = () if waits else heavy_tokens(method, num_layers, lengths)
    waiting: list[tuple[LayerInputs, Array]] = []
    layers: list[LayerCache | HeadGroups] = []

    def make(inputs: LayerInputs, scores: Array, heavy: Array) -> LayerCache | HeadGroups:
        number = len(layers)
        spec = LayerSpec(method, inputs.window, number)
        layer, _ = keep(inputs, scores, lengths, heavy, plan.capacities[number], spec, plan.implementation)
        if into is not None:
            layer = meshes.write_rows(into.cache.layers[number], layer, into.start)
        layers.append(layer)
        return layer

    def attend_layer(number: int, q: Array, k: Array, v: Array) -> Array:
        inputs = layer_inputs(model, number, q, k, v, seen)
        out, inputs = attend(inputs, method, plan.implementation)
        scores = score(inputs, method, plan.implementation)
        if waits:
            waiting.append((inputs, scores))
            return out
        # Makes the layer before the next one begins, so that its full K and V can be freed.
        return lax.optimization_barrier((out, make(inputs, scores, budgets[number])))[0]

    positions = row_positions(ids.shape[1], seen, by_length=model.config.rope_by_length)
    hidden = model.forward(ids, positions, attend_layer)
    if waits:
        counts = heavy_tokens(method, num_layers, lengths, [scores for _, scores in waiting])
        for (inputs, scores), heavy in zip(waiting, counts, strict=True):
            make(inputs, scores, heavy)
    return last_valid(hidden, lengths), KVCache(tuple(layers), lengths)


def last_valid(hidden: Float[Array, "B T *D"], lengths: Int[Array, "B"]) -> Float[Array, "B *D"]:
    """Reads the hidden state of each row's last valid token."""

    def last(hidden: Array, lengths: Array) -> Array:
        return hidden[jnp.arange(hidden.shape[0]), lengths - 1]

    return meshes.call_split(last, (hidden, lengths), (None, None), meshes.heads_at(None))


def prefill_layer(
    inputs: LayerInputs,
    method: str | Method,
    max_new_tokens: int,
    *,
    num_layers: int = 1,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Runs one layer's causal attention over right-padded prompts and compresses its cache (MiniKV algorithm 1).

    Use it in a model of your own. New tokens then go through `append` and `decode_attention`
    (`examples/flax_linen.py`).

    Args:
      inputs: queries, keys and values after the model's own position embedding, and the rows' lengths; the layer's
        number and window if they are not 0 and None; RoPE's frequencies if the scorer needs them; the softmax's soft
        cap and sink logits, if any; the output projection if the scorer needs it.
      method: a `Method` or a name.
      max_new_tokens: tokens per row that the cache will have room for, at least 0.
      num_layers: number of the model's layers, on which budgets may depend.
      implementation: "xla", "pallas" or "cuda", for all ops; by default the fastest recorded for this GPU.

    Returns:
      The attention output in `q`'s dtype, zero in the padding, and the layer's cache.

    Raises:
      ValueError: an array of another shape or dtype, a length, layer or window out of range, a method whose components
        break their contracts, a `ScoredBudget`, which needs the scores of all layers, or no output projection.
      NotImplementedError: a method that needs a whole model (`evict_every`, `retrieval_heads`, `lookahead`, a scorer
        with `needs_repeat`), or an `implementation` that cannot run this case.
    """
    check_implementation(implementation)
    inputs, method = inputs_contract("prefill_layer", inputs, num_layers), resolve(method)
    _check_single_layer(method, inputs)
    _, tokens, heads, head_dim = inputs.q.shape
    contracts.check_components(method, heads=heads, kv_heads=inputs.k.shape[2], head_dim=head_dim, layers=num_layers)
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 0, MAX_TOKENS)
    number, window = int(inputs.layer), inputs.window
    out, inputs = attend(inputs._replace(layer=jnp.int32(number)), method, implementation)
    heavy = layer_budgets(method, num_layers)[number]
    capacity = layer_capacity(method, heavy, tokens, max_new_tokens, window)
    spec = LayerSpec(method, window, number)
    scores = score(inputs, method, implementation)
    cache, _ = keep(inputs, scores, inputs.lengths, heavy.granted(inputs.lengths), capacity, spec, implementation)
    assert isinstance(cache, LayerCache)  # of all heads
    return out, cache


def _check_single_layer(method: Method, inputs: LayerInputs) -> None:
    """Raises NotImplementedError or ValueError for a method that needs more than one layer's inputs."""
    if method.evict_every is not None:
        raise NotImplementedError(
            f"evict_every={method.evict_every}: only this library's own models evict during generation"
        )
    if method.retrieval_heads:
        raise NotImplementedError(
            f"retrieval_heads={method.retrieval_heads}: only this library's own models have heads that keep all tokens"
        )
    if method.lookahead:
        raise NotImplementedError(f"lookahead={method.lookahead}: only this library's own models draft")
    if method.runs_twice:
        raise NotImplementedError(
            f"scorer={type(method.scorer).__name__}: only this library's own models run a prompt twice"
        )
    if isinstance(method.budget, ScoredBudget):
        raise ValueError(
            f"budget={type(method.budget).__name__} reads the scores of all layers: a single layer cannot be prefilled"
        )
    if method.scorer.needs_output_projection and inputs.output_projection is None:
        raise ValueError(f"scorer={type(method.scorer).__name__} needs the layer's LayerInputs.output_projection")
