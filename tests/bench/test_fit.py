"""Tests the search for the largest size within a memory limit."""

import dataclasses
import json
import pathlib

import pytest
from support.bench import bench_case

from minikv_jax.bench import end_to_end, fit


@pytest.mark.parametrize(("limit", "size"), [(99, None), (100, 1), (1090, 100), (1095, 100), (1200, 100), (550, 46)])
def test_largest_is_the_last_that_fits(limit: int, size: int | None):
    tried = []

    def needed(size: int) -> int:
        tried.append(size)
        return 90 + 10 * size

    sizes = range(1, 101)
    index = fit.largest(needed, sizes, limit)
    assert (None if index is None else sizes[index]) == size
    assert len(tried) <= 4


def test_find_agrees_with_the_whole_model(shape: str, tmp_path: pathlib.Path):
    deep = json.loads(pathlib.Path(shape).read_text()) | {"num_hidden_layers": 9, "max_position_embeddings": 8192}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(deep))
    asked = bench_case(str(path), method="full", batch=3, max_new_tokens=20)
    # XLA shares buffers of two layers differently than of more, as long prompts show.
    for one in (dataclasses.replace(asked, batch=1, prompt_len=4096), asked):
        needed = end_to_end.Programs(one).needed_bytes
        assert fit.needed_bytes(one) == pytest.approx(needed, rel=0.03)
    result = fit.find(dataclasses.replace(asked, batch=1), "batch", round(1.03 * needed))
    assert result["size"] == 3
    with pytest.raises(ValueError, match=r"full needs .* GB at batch 1, --memory-gb is 0.0001"):
        fit.find(asked, "batch", 100_000)
