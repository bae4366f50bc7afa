"""Ten thousand decode steps with rows taken at random on the way, as beam search takes them, by one compiled step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.methods import lookup
from minikv_jax.methods.method import Method, Tail

STEPS, ROWS, PROMPT = 10_000, 3, 24
LENGTHS = np.array([24, 9, 1])
MINIKV = dataclasses.replace(lookup.get("minikv"), tail=Tail(length=32), sinks=2)


@functools.cache
def model() -> mk.Llama:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model(**sizes, max_position_embeddings=1 << 14)


@dataclasses.dataclass
class Rows:
    """What every row has seen, and the row that it was at the mark, kept beside the cache in plain Python."""

    seen: list[list[int]]
    origin: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(ROWS))

    def select(self, rows: np.ndarray) -> None:
        self.seen, self.origin = [list(self.seen[row]) for row in rows], self.origin[rows]

    def append(self, tokens: np.ndarray, active: np.ndarray) -> None:
        for row, token, takes in zip(self.seen, tokens.tolist(), active.tolist(), strict=True):
            row.extend([token] * takes)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.seen]


@dataclasses.dataclass
class Soak:
    """The end of a run: the last hidden states, the cache, what it has seen, and the cache at the mark."""

    hidden: jax.Array
    cache: KVCache
    rows: Rows
    marked: KVCache | None


def soak(method: Method, room: int, mark: int | None = None) -> Soak:
    """Runs all steps. At step `mark` the cache is copied; `Rows.origin` then says where its rows have gone."""
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache: KVCache, rows: jax.Array, token: jax.Array, active: jax.Array) -> tuple[jax.Array, KVCache]:
        traces.append(1)
        return mk.decode(model(), cache.select_rows(rows), token, active)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 96, (ROWS, PROMPT))
    rows = Rows([row[:length].tolist() for row, length in zip(ids, LENGTHS, strict=True)])
    prefill = jax.jit(functools.partial(mk.prefill, method=method, max_new_tokens=room))
    hidden, cache = prefill(model(), ids, LENGTHS)
    run = Soak(hidden, cache, rows, None)
    for at in range(STEPS):
        # Now and then rows are repeated, and now and then one pauses.
        order = rng.integers(0, ROWS, ROWS) if at % 50 == 49 else rng.permutation(ROWS)
        tokens, active = rng.integers(0, 96, ROWS), (rng.random(ROWS) < 0.99).astype(np.int32)
        active |= at == STEPS - 1
        rows.select(order)
        rows.append(tokens, active)
        run.hidden, run.cache = step(run.cache, order, tokens, active)
        if at == mark:
            run.marked, rows.origin = jax.tree.map(jnp.copy, run.cache), np.arange(ROWS)
        if at % 1000 == 999:
            assert run.cache.length.tolist() == rows.lengths
            assert np.isfinite(np.asarray(run.hidden)).all()
    assert len(traces) == 1
    return run


def test_what_rows_have_seen_follows_them():
    rows = Rows([[1], [2], [3]])
    rows.select(np.array([1, 1, 0]))
    rows.append(np.array([7, 8, 9]), np.array([1, 0, 1]))
    rows.select(np.array([2, 1, 0]))
    assert (rows.seen, rows.lengths, rows.origin.tolist()) == ([[1, 9], [2], [2, 7]], [2, 1, 2], [0, 1, 1])


@pytest.mark.campaign
def test_every_token_is_kept():
    """Under `full` the last hidden states are those of one pass over all that a row has seen."""
    run = soak(lookup.get("full"), STEPS)
    lengths = run.rows.lengths
    assert run.cache.kept_tokens.tolist() == [lengths] * 2
    ids = np.array([row + [0] * (max(lengths) - len(row)) for row in run.rows.seen])
    logits = jax.jit(mk.one_shot)(model(), ids, np.array(lengths))[jnp.arange(ROWS), jnp.array(lengths) - 1]
    # Logits are of size 1; two orders of summing 10,000 weights of float32 differ by some 1e-5 of that.
    np.testing.assert_allclose(model().logits(run.hidden), logits, atol=2e-4)


@pytest.mark.campaign
def test_a_full_cache_takes_no_more():
    """There is no room for the last 1,500 tokens or more: bit for bit, what is held stays with its row."""
    run = soak(MINIKV, STEPS - 2000, mark=STEPS - 1000)
    assert run.marked is not None
    assert all((np.asarray(layer.room()) < 0).all() for layer in run.marked.layers)
    expected = run.marked.select_rows(jnp.asarray(run.rows.origin))
    for layer, old in zip(run.cache.layers, expected.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, layer, old)


@pytest.mark.campaign
def test_a_budget_is_held():
    """A method that evicts stays within its bytes however long it runs."""
    run = soak(Method(scorer=mk.H2O(), heavy=8, recent=8, sinks=2, evict_every=4), 4)
    assert min(run.rows.lengths) > STEPS // 2
    kept = np.asarray(run.cache.kept_tokens)
    assert (kept >= 2 + 8 + 8).all()
    assert (kept < 2 + 8 + 8 + 4).all()
    assert all(layer.tail.capacity == 2 + 8 + 8 + 4 for layer in run.cache.parts)
