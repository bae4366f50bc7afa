"""Teacher-forced comparison of methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from minikv_jax import presets
from minikv_jax.evaluation import book_windows, compare
from minikv_jax.evaluation.command import parse_method


def test_full_is_the_models_own_likelihood():
    model = tiny_model(max_position_embeddings=256)
    rng = np.random.default_rng(0)
    prompt, continuation = rng.integers(0, 96, 90).tolist(), rng.integers(0, 96, 21).tolist()
    coarse = dataclasses.replace(presets.get("minikv"), k_bits=1, v_bits=1, group_size=16, residual_length=32)
    results = compare(model, prompt, continuation, {"full": presets.get("full"), "coarse": coarse})

    logits = jax.nn.log_softmax(model(jnp.asarray([prompt + continuation]))[0])
    expected = -float(np.mean([logits[89 + i, token] for i, token in enumerate(continuation)]))
    full, other = results["full"], results["coarse"]
    assert full.nll == pytest.approx(expected, abs=1e-5)
    assert full.full_nll == other.full_nll == full.nll
    assert full.kl_to_full == 0
    assert full.top1_agreement == 1
    assert full.cache_bytes == full.full_cache_bytes == other.full_cache_bytes
    assert other.cache_bytes < full.cache_bytes
    assert other.kl_to_full > 1e-6
    assert other.nll != full.nll


def test_windows_do_not_overlap():
    windows = book_windows(range(100), prompt=20, continuation=5, count=4)
    assert [prompt[0] for prompt, _ in windows] == [0, 25, 50, 75]
    assert all(continuation == list(range(p[0] + 20, p[0] + 25)) for p, continuation in windows)
    with pytest.raises(ValueError, match="100 tokens: 5 windows of 25 need 125"):
        book_windows(range(100), prompt=20, continuation=5, count=5)
    with pytest.raises(ValueError, match="count=0"):
        book_windows(range(100), prompt=20, continuation=5, count=0)


def test_wrong_sizes_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="0 prompt and 1 continuation"):
        compare(model, [], [1], {})
    with pytest.raises(ValueError, match=r"60 . 10 tokens exceed the model's 64 positions"):
        compare(model, [1] * 60, [1] * 10, {})


def test_methods_are_parsed():
    config = parse_method("h2o:heavy=0.25,recent=512")
    assert (config.name, config.heavy, config.recent) == ("h2o", 0.25, 512)
    with pytest.raises(ValueError, match=r"NAME:KEY=VALUE.*'heavy'"):
        parse_method("h2o:heavy")
    with pytest.raises(ValueError, match="method 'h3o'"):
        parse_method("h3o:heavy=1")
