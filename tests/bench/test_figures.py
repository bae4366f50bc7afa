"""Tests tables and pictures of end-to-end measurements."""

import json
import pathlib

import pytest

from minikv_jax.bench import figures


def test_a_picture_shows_rows_of_one_batch_and_output_length():
    sizes = ({"batch": 1, "prompt_len": 2048}, {"batch": 1, "prompt_len": 4096}, {"batch": 4, "prompt_len": 2048})
    rows = [{**size, "max_new_tokens": 10} for size in sizes]
    longer = {"batch": 1, "prompt_len": 8192, "max_new_tokens": 20}
    assert figures.series([*rows, longer], "batch", "prompt_len") == rows[:2]


def test_a_generation_is_its_prefill_and_its_steps():
    row = {"prefill_s": 1.0, "decode_ms": 2.0, "max_new_tokens": 10}
    assert figures.generation_s(row) == pytest.approx(1.02)


def test_performance_page_shows_the_recorded_rows():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    recorded = sorted((pathlib.Path(figures.__file__).parent / "results").glob("generate_*.json"))
    assert recorded
    for file in recorded:
        assert file.name in page
        assert figures.table(json.loads(file.read_text())["results"]) in page
