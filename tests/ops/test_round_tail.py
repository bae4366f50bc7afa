"""Tests the "kivi" rule of the tail against KIVI's own bookkeeping: keys in whole runs, values one by one."""

import jax
import numpy as np
import pytest
from oracle import layout, naive
from support.layers import cache_of, normal

from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.append import append
from minikv_jax.ops.decode_attention import decode_attention

LENGTH, GROUP, H = 64, 32, 32
METHOD = Method(quantizer=MinMax(k_bits=2, v_bits=2, group_size=GROUP), tail=Tail(length=LENGTH, rule="kivi"))
PROMPTS, STEPS = [5, 63, 64, 65, 100, 128], 150
APPEND, ATTEND = jax.jit(append, donate_argnums=0), jax.jit(decode_attention)


def rounded(x: np.ndarray, axis: str) -> np.ndarray:
    return layout.quantize(x, 2, GROUP, axis, "float16", GROUP).dequantize()


def kivi_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of KIVI's code for the newest token.

    The keys before it are quantised in whole runs of `LENGTH`. All values but the newest `LENGTH` are quantised.
    (KIVI's code quantises the oldest of them one step later, after the attention.)
    """
    runs, old = (len(keys) - 1) // LENGTH * LENGTH, max(len(values) - LENGTH, 0)
    keys, values = keys.copy(), values.copy()
    if runs:
        keys[:runs] = rounded(keys[:runs], "tokens")
    for token in range(old):
        values[token] = rounded(np.repeat(values[token : token + 1], GROUP, axis=0), "channels")[0]
    return naive.attend(q, keys, values)


@pytest.mark.parametrize("chunk", [1, 50])
def test_attention_reads_what_kivi_reads(chunk: int):
    """Prompts end around multiples of the run; tokens come one by one, or many at once."""
    rng, rows = np.random.default_rng(0), len(PROMPTS)
    k, v = (normal(rng, rows, max(PROMPTS) + STEPS, 1, H) for _ in range(2))
    layer = cache_of(METHOD, k[:, : max(PROMPTS)], v[:, : max(PROMPTS)], np.array(PROMPTS), STEPS)
    for start in range(0, STEPS, chunk):
        new_k, new_v = (
            np.stack([x[row, n + start : n + start + chunk] for row, n in enumerate(PROMPTS)]) for x in (k, v)
        )
        layer = APPEND(layer, new_k, new_v, np.full(rows, chunk), np.zeros((rows, chunk), np.int32))
        if start % 5 and chunk == 1:
            continue
        q = normal(rng, rows, 1, H)
        got = np.asarray(ATTEND(q, layer))
        for row, n in enumerate(PROMPTS):
            seen = slice(0, n + start + chunk)
            want = kivi_attention(q[row, 0], k[row, seen, 0], v[row, seen, 0])
            # Packing encodes a rounded token once more, in which its scale may change by half a unit of float16.
            np.testing.assert_allclose(got[row, 0], want, atol=2**-11)
