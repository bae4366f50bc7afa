"""Tests the baseline in torch."""

import pytest
from support.bench import bench_case

from minikv_jax.bench import end_to_end, huggingface


def test_huggingface_baseline_fills_the_same_row(shape: str):
    pytest.importorskip("torch", reason="the baseline is torch's")
    row = end_to_end.measure(bench_case(shape, method="full", steps=2, max_new_tokens=6))
    other = huggingface.measure(bench_case(shape, method="huggingface-dynamic", steps=2, max_new_tokens=6))
    assert set(row) <= set(other)
    assert other["weight_bytes"] == row["weight_bytes"]
    (name,) = other["decode"]
    assert set(row["decode"][name]) == set(other["decode"][name])
    assert row["decode"][name]["cache_bytes_read"] == other["decode"][name]["cache_bytes_read"]
