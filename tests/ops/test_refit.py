"""Tests the refit of kept values against a naive one, token by token in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.naive_methods import turn
from support.layers import compressed, normal, poison

from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.methods.base import LayerInputs
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.knorm import KNorm
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.refit import refit
from minikv_jax.ops.select import Kept

BATCH, TOKENS, HEADS, KV_HEADS, DIM = 2, 90, 6, 2, 16
PROMPTS, SEEN = np.array([80, 41]), np.array([83, 48])  # the rest was drafted
FREQUENCIES = np.geomspace(1.0, 1e-3, DIM // 2).astype(np.float32)
SINKS, BLOCK, FILLED = 2, 32, 48  # slots, of which the last ones of a row are filler


def kept_tokens(rng: np.random.Generator, counts: list[int], capacity: int) -> Kept:
    """Random tokens of each prompt, other ones in each head; filler points past the end."""
    positions = np.full((BATCH, KV_HEADS, capacity), TOKENS, np.int32)
    for row, count in enumerate(counts):
        for head in range(KV_HEADS):
            positions[row, head, :count] = np.sort(rng.choice(PROMPTS[row], count, replace=False))
    return Kept(positions, np.array(counts, np.int32))  # pyright: ignore[reportArgumentType]


def refitted(
    inputs: LayerInputs, lengths: np.ndarray, kept: Kept, capacity: LayerCapacity, spec: LayerSpec
) -> np.ndarray:
    """Runs `refit` as a compiled program."""
    window = inputs.window  # static

    def run(inputs: LayerInputs) -> jax.Array:
        tokens = jax.tree.map(jnp.asarray, kept)
        return refit(inputs._replace(window=window), jnp.asarray(lengths), tokens, capacity, spec)

    return np.asarray(jax.jit(run)(inputs._replace(window=None)))


def naive_weights(queries: np.ndarray, keys: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Softmax `[n, S]` of `[n, H]` queries over `[S, H]` keys; a row that sees nothing is zero."""
    logits = np.where(seen, queries @ keys.T / np.sqrt(DIM), -np.inf)
    weights = np.exp(logits - np.max(logits, axis=1, keepdims=True, initial=-1e30))
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


def naive_values(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, at: np.ndarray, keys: np.ndarray, row: int, method: Ridge, window: int
) -> np.ndarray:
    """New values of the tokens at positions `at`, of one row and KV head, by ridge regression's normal equations."""
    whole, few, answers = [], [], []
    seen = SEEN[row]
    chosen = [(query, query) for query in range(max(seen - method.queries, 0), seen)]
    chosen += [(seen - 1 - number * seen // method.turned, seen + 16) for number in range(method.turned)]
    for source, query in chosen:
        for head in range(q.shape[1]):
            one = turn(q[source, head], query - source, FREQUENCIES)[None]
            visible = np.arange(PROMPTS[row])
            visible = visible[(visible <= query) & (visible > query - window)]
            near = (at <= query) & (at > query - window)
            whole.append(naive_weights(one, k[visible], np.ones((1, len(visible)), bool))[0])
            few.append(naive_weights(one, keys, near[None])[0])
            answers.append(whole[-1] @ v[visible])
    x, y = np.array(few), np.array(answers)
    ridge = method.strength * np.trace(x.T @ x) / len(at)
    change = np.linalg.solve(x.T @ x + ridge * np.eye(len(at)), x.T @ (y - x @ v[at]))
    return v[at] + change


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("quantizer", [None, MinMax(k_bits=2, v_bits=4, group_size=16)])
@pytest.mark.parametrize("turned", [0, 7])
def test_ridge_is_the_naive_one(turned: int, quantizer: MinMax | None, window: int | None):
    """Also for ragged rows, drafts after the prompts, NaN in the padding, and keys that are read as they are stored."""
    rng = np.random.default_rng(5)
    q, k, v = (normal(rng, BATCH, TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    poison(SEEN, q, k, v)
    method = Method(
        scorer=KNorm(),
        heavy=20,
        recent=8,
        sinks=SINKS,
        quantizer=quantizer,
        tail=Tail(length=BLOCK),
        refit=Ridge(queries=12, strength=0.1, turned=turned),
    )
    counts = [47, 39]
    kept = kept_tokens(rng, counts, FILLED)
    spec = LayerSpec(method, window)
    inputs = LayerInputs(q, k, v, SEEN, window=window, frequencies=jnp.asarray(FREQUENCIES))  # pyright: ignore[reportArgumentType]
    capacity = LayerCapacity(FILLED, 32, 64)
    new = refitted(inputs, PROMPTS, kept, capacity, spec)
    layer = compressed(k, v, kept, capacity, spec)  # pyright: ignore[reportArgumentType]
    for row, count in enumerate(counts):
        for head in range(KV_HEADS):
            at = np.asarray(kept.positions)[row, head, :count]
            keys = k[row, at, head].astype(np.float64)
            if quantizer is not None:
                packed = int(layer.packed.length[row])
                assert packed == BLOCK
                read, _ = layer.packed_tokens(0, packed, np.float32)
                keys[SINKS : SINKS + packed] = np.asarray(read)[row, head]
            group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
            arrays = q[row, :, group].astype(np.float64), k[row, :, head], v[row, :, head].astype(np.float64)
            assert isinstance(method.refit, Ridge)
            want = naive_values(*arrays, at, keys, row, method.refit, window or 2 * TOKENS)
            # The largest eigenvalue is up to 1e3 times the ridge, so float32 solves to about 1e3 * 2**-24.
            np.testing.assert_allclose(new[row, at, head], want, rtol=1e-4, atol=1e-4)
            others = np.setdiff1d(np.arange(SEEN[row]), at)
            np.testing.assert_array_equal(new[row, others, head], v[row, others, head])


def test_a_weak_ridge_gives_the_newest_queries_their_answers_back():
    """With more kept tokens than queries, the output of these queries is that over the whole prompt."""
    rng = np.random.default_rng(6)
    q, k, v = (normal(rng, 1, 64, heads, DIM) for heads in (2, 1, 1))
    at = np.sort(rng.choice(64, 40, replace=False))[None, None].astype(np.int32)
    method = Method(scorer=KNorm(), heavy=20, recent=4, refit=Ridge(queries=4, strength=1e-6))
    lengths = np.array([64])
    inputs = LayerInputs(q, k, v, lengths)  # pyright: ignore[reportArgumentType]
    kept = Kept(at, np.array([40]))  # pyright: ignore[reportArgumentType]
    new = refitted(inputs, lengths, kept, LayerCapacity(40, 0, 40), LayerSpec(method))
    for query in range(60, 64):
        for head in range(2):
            one = q[0, query, head][None]
            whole = naive_weights(one, k[0, :, 0], np.arange(64)[None] <= query) @ v[0, :, 0]
            seen = at[0] <= query
            before = naive_weights(one, k[0, at[0, 0], 0], seen) @ v[0, at[0, 0], 0]
            after = naive_weights(one, k[0, at[0, 0], 0], seen) @ new[0, at[0, 0], 0]
            assert np.abs(after - whole).max() < 1e-3 < np.abs(before - whole).max()
