"""Scorers beyond MiniKV's own against their papers' formulas, on ragged rows with NaN in the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive_schemes
from support.tiny import tiny_config

from minikv_jax.methods.base import SCORERS, ScorerInputs
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.rotary import inverse_frequencies

LENGTHS, T, H, SINKS, LAG = [40, 33, 13, 3], 40, 16, 2, 8
FREQUENCIES = inverse_frequencies(tiny_config(head_dim=H))
OPTIONS = {"lagkv": {"lag": LAG}, "expected-attention": {"future": 6, "epsilon": 0.01}}


@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("name", ["tova", "knorm", "keydiff", "lagkv", "expected-attention"])
def test_scores_match_the_formula(name: str, heads: tuple[int, int]):
    rng = np.random.default_rng(0)
    shapes = [(len(LENGTHS), T, count, H) for count in (heads[0], heads[1], heads[1])]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    padding = np.arange(T) >= np.array(LENGTHS)[:, None]
    for x in (q, k, v):
        x[padding] = np.nan
    config = CacheConfig(scorer=name, heavy=4, recent=4, sinks=SINKS, options=OPTIONS.get(name, {}))

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        inputs = ScorerInputs(q, k, v, lengths, None, None, 0, jnp.asarray(FREQUENCIES))
        return SCORERS[name].score(inputs, config)

    got = np.asarray(run(q, k, v, np.array(LENGTHS)))
    assert got.shape == (len(LENGTHS), heads[1], T)
    want = naive_schemes.prompt_scores(config, q, k, v, LENGTHS, FREQUENCIES)
    for b, n in enumerate(LENGTHS):
        for head in range(heads[1]):
            first = SINKS if name == "expected-attention" else 0  # the sinks are kept whatever they score
            # Exponents up to ~10 carry 16 roundings of float32, of which some 1e-5 remains in the weights.
            np.testing.assert_allclose(got[b, head, first:n], want[b, head, first:n], rtol=2e-5, atol=1e-6)


def test_expected_attention_needs_the_rotation():
    config = CacheConfig(scorer="expected-attention", heavy=2, recent=2)
    x, lengths = jnp.zeros((1, 8, 2, H)), jnp.array([8])
    with pytest.raises(ValueError, match="rotary frequencies"):
        SCORERS["expected-attention"].score(ScorerInputs(x, x, x, lengths, None, None), config)
