"""Tests `minikv memory`."""

import json
import pathlib

import pytest
from support.commands import Run, run_wrongly
from support.full_disk import full_disk

from minikv_jax.cache import memory
from minikv_jax.generate import generate
from minikv_jax.methods import lookup
from minikv_jax.models import hub
from minikv_jax.prompts import bucket_length

MEMORY = ["memory", "--model", "{model}", "--prompt-len", "64"]


def test_memory_prints_the_report(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    out = tmp_path / "out.json"
    sizes = ["--prompt-len", 512, "--max-new-tokens", 64, "--batch", 3, "--dtype", "float32", "--json", out]
    code, text, _ = run("memory", "--model", model_directory, "--method", "minikv-pyramid", *sizes)
    assert code == 0
    expected = memory.report(
        hub.load_config(model_directory),
        lookup.get("minikv-pyramid"),
        prompt_length=512,
        max_new_tokens=64,
        batch=3,
        dtype="float32",
    )
    for value in (expected.packed_bytes, expected.tail_bytes, expected.bytes, expected.full_bytes):
        assert f"{value:,} bytes" in text
    assert f"{expected.full_bytes - expected.bytes:,} bytes ({expected.saved:.1%})" in text
    assert json.loads(out.read_text())["bytes"] == expected.bytes
    written = out.read_bytes()
    with full_disk(100):
        code, _, error = run("memory", "--model", model_directory, *sizes)
    assert (code, error) == (2, f"minikv: error: [Errno 27] File too large: '{out}'\n")
    assert out.read_bytes() == written
    weights = memory.weight_bytes(hub.load_config(model_directory), "float32")
    assert f"{weights:,} bytes of weights" in text
    assert f"{(weights + expected.full_bytes) / (weights + expected.bytes):.2f}x (if decoding is memory-bound)" in text
    short = ["--prompt", 512, "--new", 64, "--batch", 3, "--dtype", "float32"]
    assert run("memory", "--config", model_directory / "config.json", "--method", "minikv-pyramid", *short)[1] == text


def test_memory_of_a_padded_prompt_is_the_cache_that_generate_makes(run: Run, model_directory: pathlib.Path):
    model, _ = hub.load(model_directory)
    result = generate(model, [[1] * 70], method="minikv", max_new_tokens=20)
    sizes = ["--prompt-len", bucket_length(70), "--max-new-tokens", 20, "--dtype", "float32"]
    assert f"{result.cache.nbytes:,} bytes" in run("memory", "--model", model_directory, *sizes)[1]


def test_a_plugin_method_by_name(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    plugin = tmp_path / "half.py"
    plugin.write_text(
        "import minikv_jax as mk\n"
        "mk.register_method(mk.Method(name='newest-half', recent=0.5, quantizer=mk.MinMax(k_bits=4, v_bits=4)))\n"
    )
    sizes = ["--model", model_directory, "--prompt-len", 128, "--max-new-tokens", 16]
    code, text, _ = run("memory", *sizes, "--plugin", plugin, "--method", "newest-half")
    assert code == 0
    assert "64 of 128 tokens" in text
    code, _, error = run("memory", *sizes, "--plugin", tmp_path / "absent.py", "--method", "newest-half")
    assert code == 2
    assert "absent.py" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MEMORY, "--batch", "0"], "batch=0"),
        ([*MEMORY, "--set", "group_size=32"], "head_dim 16"),
        (["memory", "--config", "{scratch}/object.json", "--prompt-len", "64"], "model_type"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], message: str
):
    (tmp_path / "object.json").write_text("{}")
    error = run_wrongly(run, *(text.format(model=model_directory, scratch=tmp_path) for text in arguments))
    assert message in error
