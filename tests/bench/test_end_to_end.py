import dataclasses
import importlib
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from support.tiny import tiny_config, tiny_model

from minikv_jax.bench import end_to_end, figures, fit, worker
from minikv_jax.bench.end_to_end import Case, _Lengths
from minikv_jax.bench.generate import _share
from minikv_jax.cache import memory
from minikv_jax.cli import main as cli
from minikv_jax.generate import generate, stream
from minikv_jax.methods import lookup as presets


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's config.json."""
    fields = dataclasses.asdict(tiny_config(head_dim=32)) | {"eos_token_id": None}
    fields = {name: value for name, value in fields.items() if value is not None and name != "eos_token_ids"}
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(fields))
    return str(path)


def case(shape: str, **changes: Any) -> Case:
    fields: dict[str, Any] = {"method": "minikv", "batch": 2, "prompt_len": 100, "max_new_tokens": 160, "steps": 8}
    fields |= {"dtype": "float32"} | changes
    return Case(shape=shape, **fields)


def test_command_reports_a_run_that_fails(shape: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    common = [
        "bench",
        "generate",
        "--shape",
        shape,
        "--prompt-len",
        "70",
        "--max-new-tokens",
        "8",
        "--dtype",
        "float32",
    ]
    options = ["--implementation", "cuda", "--method", "minikv", "--batch", "3", "--output", str(out)]
    assert cli.main([*common, *options]) == 1
    report = json.loads(out.read_text())
    assert report["command"].startswith("minikv bench generate --shape")
    assert report["device"] == jax.devices()[0].device_kind
    assert report["versions"]["jax"] == jax.__version__
    (row,) = report["results"]
    assert (row["method"], row["batch"], row["prompt_len"]) == ("minikv", 3, 70)
    assert "CUDA" in row["error"]  # there is no such kernel here
    assert row["error"] in capsys.readouterr().out


def test_command_finds_and_measures(
    shape: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def here(module: str, function: str, *arguments: Any, environment: dict[str, str]) -> Any:
        shares.append(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        return getattr(importlib.import_module(module), function)(*json.loads(json.dumps(arguments)))

    shares: list[str] = []
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", here)
    out = tmp_path / "out.json"
    common = ["bench", "generate", "--shape", shape, "--prompt-len", "64", "--max-new-tokens", "4", "--method", "full"]
    assert cli.main([*common, "--find", "batch", "--memory-gb", "0.003", "--output", str(out)]) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["batch"] == row["found"]["size"] > 1
    assert row["predicted_bytes"] <= row["memory_limit_bytes"] == 3_000_000
    assert f"batch {row['batch']:4}" in capsys.readouterr().out
    assert len(shares) == 3  # the device, the search, the run


def test_row_says_what_was_allocated_and_read(shape: str):
    asked = case(shape)
    row = end_to_end.measure(asked)
    config, method = asked.config(), presets.get("minikv")
    # 100 tokens are padded to 112
    sizes = memory.report(config, method, prompt_length=112, max_new_tokens=160, batch=2, dtype="float32")
    assert row["cache_bytes"] == sizes.bytes
    assert row["weight_bytes"] == memory.weight_bytes(config, "float32")
    assert row["predicted_bytes"] > row["weight_bytes"] + row["cache_bytes"]
    assert row["decode"]["middle"]["first_step"] == 76
    assert row["decode"]["end"]["first_step"] == 152
    assert 0 < row["decode"]["middle"]["cache_bytes_read"] <= sizes.bytes
    assert 0 < row["decode"]["end"]["cache_bytes_read"] <= sizes.bytes
    assert row["decode_tokens_per_s"] == pytest.approx(2e3 / row["decode_ms"])
    assert 0 < row["prefill_s"] < row["time_to_first_token_s"]
    assert "all" in end_to_end.measure(case(shape, steps=None, max_new_tokens=4))["decode"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_weights_are_of_the_asked_dtype(model_directory: pathlib.Path, dtype: str):
    """And a method may come with changes."""
    asked = Case(
        model=str(model_directory), method="minikv:k_bits=4", batch=1, prompt_len=64, max_new_tokens=4, dtype=dtype
    )
    row = end_to_end.measure(asked)
    method = dataclasses.replace(presets.get("minikv"), k_bits=4)
    sizes = memory.report(asked.config(), method, prompt_length=64, max_new_tokens=4, dtype=dtype)
    assert row["cache_bytes"] == sizes.bytes
    assert row["weight_bytes"] == memory.weight_bytes(asked.config(), dtype)


@pytest.mark.parametrize("method", ["minikv", "kivi-2", "full"])
@pytest.mark.parametrize("step", [1, 60, 159])
def test_a_stretch_starts_where_decoding_would_have_come(method: str, step: int):
    model = tiny_model(max_position_embeddings=512, head_dim=32)
    results = stream(model, [[1] * 70, [2] * 33], cache=method, max_new_tokens=160, eos_token_ids=(), chunk=step)
    prompt = jax.tree.map(np.asarray, _Lengths.of(next(results).cache))
    decoded = next(results).cache
    found, expected = prompt.after(step, decoded), _Lengths.of(decoded)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_bytes_read_are_those_of_the_valid_tokens():
    cache = generate(tiny_model(), [[1] * 40], cache="full", max_new_tokens=10, eos_token_ids=()).cache
    layers, kv_heads, head_dim, both, size = 2, 2, 16, 2, 4
    now = jax.tree.map(np.asarray, _Lengths.of(cache))
    assert end_to_end.bytes_read(cache, now, range(1)) == 50 * both * layers * kv_heads * head_dim * size
    assert end_to_end.bytes_read(cache, now, range(3)) == 51 * both * layers * kv_heads * head_dim * size


def test_random_model_has_the_config_and_no_constant_weight(shape: str):
    config = case(shape).config()
    model = end_to_end.random_model(config, "bfloat16")
    assert model.config == config
    for leaf in jax.tree.leaves(end_to_end.nnx.state(model)):
        assert leaf.dtype == "bfloat16"
        assert leaf.ndim == 1 or float(leaf.std()) > 0.01


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
    asked = case(str(path), method="full", batch=3, max_new_tokens=20)
    # XLA shares buffers of two layers otherwise than of more: seen where the prompt is long.
    for one in (dataclasses.replace(asked, batch=1, prompt_len=4096), asked):
        whole = end_to_end.Programs(one).needed_bytes
        assert fit.needed_bytes(one) == pytest.approx(whole, rel=0.03)
    found = fit.find(dataclasses.replace(asked, batch=1), "batch", round(1.03 * whole))
    assert found["size"] == 3
    with pytest.raises(ValueError, match=r"full needs .* GB at batch 1, --memory-gb is 0.0001"):
        fit.find(asked, "batch", 100_000)


def test_worker_gives_back_results_and_errors():
    assert worker.run_task("json", "loads", "[1]") == [1]
    with pytest.raises(ValueError, match="shape 'llama9'"):
        worker.run_task("minikv_jax.bench.end_to_end", "shape_config", "llama9")
    with pytest.raises(worker.TaskError, match="No module named 'nowhere'"):
        worker.run_task("nowhere", "f")


@pytest.mark.parametrize("name", ["llama2-7b", "llama-3.1-8b"])
def test_named_shapes_have_the_published_number_of_parameters(name: str):
    config = end_to_end.shape_config(name)
    leaves = jax.tree.leaves(end_to_end.nnx.state(end_to_end.skeleton(config, "bfloat16")))
    assert sum(leaf.size for leaf in leaves) == {"llama2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248}[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "llama9"], "llama9"),
        (["--shape", "{bad}"], "not valid JSON"),
        (["--shape", "{shape}", "--method", "minkv"], "minkv"),
        (["--shape", "{shape}", "--method", "minikv:k_bits=5"], "k_bits=5"),
        (["--shape", "{shape}", "--find", "batch"], "--memory-gb"),
        (["--shape", "{shape}", "--memory-gb", "-1"], "--memory-gb -1"),
        (["--shape", "{shape}", "--memory-gb", "1e-10"], "--memory-gb 1e-10"),
        (["--shape", "{shape}", "--memory-gb", "inf"], "--memory-gb inf"),
        (
            ["--shape", "{shape}", "--find", "batch", "--memory-gb", "1", "--method", "huggingface-static"],
            "huggingface",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    options: list[str],
    message: str,
    shape: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("minikv_jax.bench.generate.run_task", None)  # nothing may be started
    (tmp_path / "bad.json").write_text("{")
    assert cli.main(["bench", "generate", *(o.format(shape=shape, bad=tmp_path / "bad.json") for o in options)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--batch", "0"], ["--prompt-len", "x"], ["--dtype", "int8"]])
def test_values_out_of_range_are_usage_errors(option: list[str], shape: str):
    with pytest.raises(SystemExit):
        cli.main(["bench", "generate", "--shape", shape, *option])


def test_huggingface_baseline_fills_the_same_row(shape: str):
    pytest.importorskip("torch", reason="the baseline is torch's")
    row = end_to_end.measure(case(shape, method="full", steps=2, max_new_tokens=6))
    from minikv_jax.bench import huggingface

    other = huggingface.measure(case(shape, method="huggingface-dynamic", steps=2, max_new_tokens=6))
    assert set(row) <= set(other)
    assert other["weight_bytes"] == row["weight_bytes"]
    (name,) = other["decode"]
    assert set(row["decode"][name]) == set(other["decode"][name])
    assert row["decode"][name]["cache_bytes_read"] == other["decode"][name]["cache_bytes_read"]


def test_figures_and_table_show_what_was_measured(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    measured = {"prefill_s": 1.0, "decode_ms": 2.0, "times_floor": 1.25, "peak_bytes": 10**9, "cache_bytes": 5 * 10**8}
    measured |= {"max_new_tokens": 10, "compile_s": {"prefill": 3.0, "decode": 1.6}}

    def row(method: str, batch: int, prompt: int) -> dict[str, Any]:
        sizes = {"shape": "llama-3.1-8b", "method": method, "batch": batch, "prompt_len": prompt}
        return sizes | measured | {"decode_tokens_per_s": batch / 0.002}

    assert figures.generation_s(row("full", 1, 64)) == pytest.approx(1.02)
    rows = [row(method, *sizes) for method in ("minikv", "full") for sizes in ((1, 2048), (1, 4096), (4, 2048))]
    longer = row("full", 1, 8192) | {"max_new_tokens": 20}
    assert figures._series([*rows, longer], "batch", "prompt_len") == [r for r in rows if r["batch"] == 1]
    failed = {"method": "full", "batch": 8, "prompt_len": 64, "max_new_tokens": 10, "error": "out of memory: 9 GB"}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"device": "D", "results": [*rows, failed]}))
    assert cli.main(["bench", "figures", str(file), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| `minikv` | 4 | 2,048 + 10 | 1.000 | 2.00 | 1.25 | 2,000 | 1.0 | 0.50 | 5 |\n" in out
    assert "| `full` | 8 | 64 + 10 | out of memory | | | | | | |\n" in out
    names = {"llama-3.1-8b-latency.png", "llama-3.1-8b-batches.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names


def test_a_limit_is_not_exceeded_by_rounding():
    total, region = 150_109_945_856, 1 << 21  # an H200; its allocator takes whole regions
    for limit in (40_000_000_000, 80_000_000_000, 39_999_999_999, region):
        taken = math.ceil(float(f"{_share(limit, total):.6f}") * total / region) * region
        assert limit - 2 * region <= taken <= limit


def test_figures_of_two_devices_are_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps({"device": file.stem, "results": []}))
    assert cli.main(["bench", "figures", *map(str, files), "--out", str(tmp_path)]) == 2
    assert "results of a, b: expected one device" in capsys.readouterr().err


def test_performance_page_shows_the_recorded_rows():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    recorded = sorted((pathlib.Path(figures.__file__).parent / "results").glob("generate_*.json"))
    assert recorded
    for file in recorded:
        assert file.name in page
        assert figures.table(json.loads(file.read_text())["results"]) in page


@pytest.mark.parametrize("name", ["llama2-7b", "llama-3.1-8b"])
@pytest.mark.parametrize("method", ["full", "minikv"])
def test_performance_page_shows_the_formula(name: str, method: str):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    config = end_to_end.shape_config(name)
    weights = memory.weight_bytes(config) + 2 * config.vocab_size * config.hidden_size  # and the embedding table

    def cache(prompt: int) -> int:
        return memory.report(config, presets.get(method), prompt_length=prompt, max_new_tokens=1024).bytes

    row = cache(2048)
    rows = [(limit * 10**9 - weights) // row for limit in (40, 80)]
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} | `{method}` | {row:,} | "))
    assert f"| {rows[0]} | {rows[1]} |" in line
    longest = int(line.rstrip("k |").split("| ")[-1].replace(",", ""))
    assert weights + cache(1024 * longest) <= 40e9 < weights + cache(1024 * (longest + 1))
