"""Runs the examples and the README's Python."""

import pathlib
import re
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import random_tensors, write_hf
from support.model_directory import byte_tokenizer
from support.tiny import tiny_config, tiny_model

import minikv_jax
from minikv_jax.cache import memory
from minikv_jax.methods import lookup
from minikv_jax.prompts import bucket_length

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run_example(name: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model), "--max-new-tokens", "5"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_generate_prints_both_rows_and_the_bytes(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("generate.py", model_directory, monkeypatch)
    *texts, last = capsys.readouterr().out.splitlines()
    assert len(texts) == 2
    match = re.fullmatch(r"([\d,]+) bytes of cache, ([\d,]+) of them packed", last)
    assert match is not None
    model, tokenizer = minikv_jax.load(model_directory)
    assert tokenizer is not None
    longest = len(tokenizer.encode("In the year of the great storm the keeper"))
    sizes: dict[str, Any] = {"batch": 2, "prompt_length": bucket_length(longest), "max_new_tokens": 5}
    report = memory.report(model.config, "minikv", dtype="float32", **sizes)
    assert [int(number.replace(",", "")) for number in match.groups()] == [report.bytes, report.packed_bytes]


def test_chat_appends_the_second_turn_to_the_first(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("chat.py", model_directory, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    first, second = [int(line.strip("[").split()[0]) for line in lines if "tokens seen" in line]
    assert first >= len("Name a city by the sea.")
    assert second >= first + len("What can I see there?")


@pytest.mark.parametrize("kind", ["scorer", "budget", "quantizer"])
def test_a_plugin_of_under_40_lines_is_a_method(kind: str):
    path = EXAMPLES / f"plugin_{kind}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    names = minikv_jax.load_plugin(path)
    assert set(names) == {kind, "method"}
    (method,) = names["method"]
    model = tiny_model(head_dim=32, max_position_embeddings=512)
    row = np.random.default_rng(0).integers(0, 96, 128).tolist()
    cache = minikv_jax.generate(model, [row], method=method, max_new_tokens=4, eos_token_ids=()).cache
    report = memory.report(model.config, method, prompt_length=128, max_new_tokens=4, dtype="float32")
    assert cache.nbytes == report.bytes
    assert int(cache.kept_tokens.max()) < 128
    assert int(jnp.stack([layer.packed.length for layer in cache.parts]).max()) > 0


LENGTHS, STEPS = (64, 40), 5


@pytest.fixture(scope="module")
def linen() -> dict[str, Any]:
    """Loads the Flax Linen example, with prompts and parameters of its decoder."""
    names = runpy.run_path(str(EXAMPLES / "flax_linen.py"))
    ids = np.random.default_rng(0).integers(0, 256, (2, max(LENGTHS)))
    params = names["Decoder"](lookup.get("full")).init(jax.random.key(1), ids[:, :8], jnp.array([8, 8]))
    return names | {"ids": ids, "params": params}


def linen_bytes(method: str, prompt_length: int) -> int:
    """Bytes of the example's two layers for two rows."""
    config = tiny_config(head_dim=32)
    report = memory.report(config, method, prompt_length=prompt_length, max_new_tokens=64, batch=2, dtype="float32")
    return sum(report.layer_bytes)


def test_a_flax_model_of_ones_own_generates_as_without_a_cache(linen: dict[str, Any]):
    """`full` gives the tokens of running the whole text at once."""
    model = linen["Decoder"](lookup.get("full"))
    tokens, _ = linen["generate"](model, linen["params"], linen["ids"], jnp.array(LENGTHS), STEPS)
    for b, length in enumerate(LENGTHS):
        text = np.concatenate([linen["ids"][b, :length], tokens[b]])
        logits, _ = model.apply(linen["params"], text[None], jnp.array([length + STEPS]))
        np.testing.assert_array_equal(jnp.argmax(logits[0, length - 1 : -1], axis=-1), tokens[b])


def test_a_flax_model_of_ones_own_holds_the_bytes_of_its_method(linen: dict[str, Any]):
    model = linen["Decoder"](lookup.get("minikv"))
    _, caches = linen["generate"](model, linen["params"], linen["ids"], jnp.array(LENGTHS), STEPS)
    assert sum(cache.nbytes for cache in caches) == linen_bytes("minikv", max(LENGTHS))


def test_the_flax_example_prints_what_it_saves(
    linen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["flax_linen.py", "--max-new-tokens", "3"])
    linen["main"]()
    full, minikv, last = capsys.readouterr().out.splitlines()
    sizes = [int(line.split(": ")[1].split(" bytes")[0].replace(",", "")) for line in (full, minikv)]
    assert sizes == [linen_bytes(name, 512) for name in ("full", "minikv")]
    assert last == f"{1 - sizes[1] / sizes[0]:.0%} of the cache saved"
    assert 2 * sizes[1] < sizes[0]


def test_the_python_of_the_readme_runs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = byte_tokenizer()
    config = tiny_config(head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=1024)
    write_hf(tmp_path, config, random_tensors(config))
    tokenizer.save_pretrained(tmp_path)
    log = tmp_path / "log.txt"
    log.write_text("The tide went out, and " * 9, encoding="utf-8")
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    quickstart, plugin = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for code in (quickstart, plugin):
        exec(code.replace("smollm2-135m-instruct", str(tmp_path)).replace("examples/log.txt", str(log)), names)
        assert capsys.readouterr().out.splitlines()[-1].endswith(" bytes")


def test_rollouts_from_a_compressed_cache_learn_the_toy_reward():
    example = runpy.run_path(str(EXAMPLES / "rollouts.py"))
    rewards = list(example["train"](example["tiny_model"](), "minikv", steps=9, rows=16, prompt=48, new=8))
    assert rewards[-1] > max(rewards[0], 0.5) + 0.15


def test_a_distilled_scorer_finds_what_is_attended_to(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On passages that it has not seen, it keeps more of the later attention than a share of the tokens by chance."""
    sizes = ["--tokens", "64", "--steps", "60", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["distil_scorer.py", "--model", str(model_directory), *sizes])
    runpy.run_path(str(EXAMPLES / "distil_scorer.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    student, knorm, teacher = (float(re.findall(r"([\d.]+)% of later", line)[0]) for line in lines[:3])
    assert knorm < student <= teacher
    assert student > 25
