"""Tests `minikv generate` and its conversations."""

import io
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import Run, run_wrongly
from support.model_directory import byte_tokenizer

from minikv_jax.generate import generate, stream
from minikv_jax.methods import lookup
from minikv_jax.models import chat, hub
from minikv_jax.programs import GenerateResult

PROMPT = "The lamp was lit at dusk and burned until the morning. " * 3


def test_generate_reports_what_the_library_returns(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    out = tmp_path / "out.json"
    options = ["--set", "heavy=0.3", "--max-new-tokens", 40, "--no-chat-template", "--json", out]
    code, text, _ = run("generate", "--model", model_directory, "--prompt", PROMPT, *options)
    assert code == 0
    model, tokenizer = hub.load(model_directory)
    assert tokenizer is not None
    method = lookup.override(lookup.get("minikv"), {"heavy": "0.3"})
    result = generate(model, [tokenizer.encode(PROMPT)], method=method, max_new_tokens=40)
    report = json.loads(out.read_text())
    tokens = result.tokens[0, : int(result.lengths[0])].tolist()
    assert report["tokens"] == tokens
    assert report["generated_tokens"] == len(tokens)
    assert report["prompt_tokens"] == len(PROMPT)
    assert report["settings"] == {"heavy": "0.3"}
    assert report["dtype"] == "float32"
    cache = report["cache"]
    assert cache["bytes"] == result.cache.nbytes
    assert cache["packed_bytes"] == result.cache.packed_bytes
    assert cache["per_layer"] == result.cache.kept_tokens[:, 0].tolist()
    full = generate(model, [tokenizer.encode(PROMPT)], method="full", max_new_tokens=40).cache
    assert cache["full_bytes"] == full.parts[0].tail.k.nbytes * 2 * len(full.layers)
    assert report["text"] in text
    assert f"{result.cache.nbytes:,} bytes" in text
    assert f"{1 - cache['ratio']:.1%}" in text


def test_a_call_that_waits_for_the_device_is_not_compilation(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """On a GPU, the call that starts a program with a loop takes the time of prefill and first tokens."""

    def slow(*arguments: Any, **options: Any) -> Iterator[GenerateResult]:
        results = stream(*arguments, **options)
        return (time.sleep(0.2) or result for result in results)

    monkeypatch.setattr("minikv_jax.cli.generate.stream", slow)
    timings = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        options = ["--max-new-tokens", 6, "--no-chat-template", "--json", out]  # a program that no other test compiles
        assert run("generate", "--model", model_directory, "--prompt", PROMPT, *options)[0] == 0
        timings.append(json.loads(out.read_text())["timing"])
    first, second = timings
    for timing in timings:
        assert min(timing["prefill_s"], timing["decode_s"]) > 0.2
    assert first["compile_s"] > second["compile_s"]


def test_chat_template_is_used_unless_declined(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    lengths = []
    for options in ([], ["--raw"]):
        out = tmp_path / "out.json"
        common = ["--model", model_directory, "--prompt", "hello", "--max-new-tokens", 3, "--json", out]
        assert run("generate", *common, *options)[0] == 0
        lengths.append(json.loads(out.read_text())["prompt_tokens"])
    assert lengths == [1 + len("hello") + 1 + 1 + 1, len("hello")]  # role, text, end, newline, role


def test_prompt_and_tokens_files_give_what_the_text_gives(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path
):
    (tmp_path / "prompt.txt").write_text("hello")
    (tmp_path / "ids.json").write_text(json.dumps(byte_tokenizer().encode("hello")))
    tokens = []
    for source in (
        ["--prompt", "hello"],
        ["--prompt-file", tmp_path / "prompt.txt"],
        ["--tokens-file", tmp_path / "ids.json"],
    ):
        out = tmp_path / "out.json"
        options = ["--raw", "--max-new-tokens", 4, "--json", out]
        assert run("generate", "--model", model_directory, *source, *options)[0] == 0
        tokens.append(json.loads(out.read_text())["tokens"])
    assert tokens[0] == tokens[1] == tokens[2]


def test_sampling_options_reach_the_draw(run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path):
    def tokens(*options: object) -> list[int]:
        out = tmp_path / "out.json"
        common = ["--model", model_directory, "--prompt", "hello", "--max-new-tokens", 8, "--json", out]
        assert run("generate", *common, *options)[0] == 0
        return json.loads(out.read_text())["tokens"]

    greedy, first = tokens(), tokens("--temperature", 5, "--seed", 1)
    assert first != greedy
    assert tokens("--temperature", 5, "--seed", 1) == first
    assert tokens("--temperature", 5, "--seed", 2) != first
    assert tokens("--temperature", 5, "--top-k", 1) == greedy
    assert tokens("--temperature", 5, "--top-p", 1e-6) == greedy


def test_chat_carries_the_cache_from_turn_to_turn(
    run: Run, model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand now?\n"))
    code, _, log = run("generate", "--model", model_directory, "--chat", "--max-new-tokens", 6)
    assert code == 0
    seen = [int(line.split(" of ")[1].split()[0]) for line in log.splitlines() if "kept per layer" in line]
    model, tokenizer = hub.load(model_directory)
    assert tokenizer is not None
    result = generate(model, [chat.first_turn(tokenizer, "hello")], method="minikv", max_new_tokens=6)
    assert seen[0] == int(result.cache.length[0])
    last = int(result.tokens[0, int(result.lengths[0]) - 1])
    turn = chat.next_turn(tokenizer, "and now?", last)
    assert seen[0] + len(turn) < seen[1] <= seen[0] + len(turn) + 6


def test_weights_and_logits_that_are_not_finite_are_errors(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path
):
    directory, out = tmp_path / "nan", tmp_path / "out.json"
    shutil.copytree(model_directory, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32("nan")
    save_file(tensors, directory / "model.safetensors")
    command = ["generate", "--model", directory, "--prompt", "hello", "--max-new-tokens", 3]
    assert "NaN or infinite values in model.norm.weight" in run_wrongly(run, *command)
    code, _, error = run(*command, "--allow-nonfinite", "--json", out)
    assert code == 2
    assert error == "minikv: error: logits are NaN or infinite: the text means nothing from some token on\n"
    assert json.loads(out.read_text())["finite_logits"] is False


def test_verbose_names_each_implementation_once(run: Run, model_directory: pathlib.Path):
    jax.clear_caches()  # ops are named as they are traced
    options = ["--max-new-tokens", 9, "--set", "recent=0.25", "--verbose"]
    code, _, err = run("generate", "--model", model_directory, "--prompt", PROMPT, *options)
    assert code == 0
    for op in ("prefill_attention", "quantize", "append", "decode_attention"):
        named = [line for line in err.splitlines() if line.startswith(f"{op} ")]
        assert named
        assert len(set(named)) == len(named)


GENERATE = ["generate", "--model", "{model}", "--prompt", "hello"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "hello"], "--model"),
        (["generate", "--model", "{model}"], "--prompt"),
        ([*GENERATE, "--method", "nosuch"], "method 'nosuch': expected one of"),
        ([*GENERATE, "--set", "heavy"], "expected KEY=VALUE"),
        ([*GENERATE, "--set", "weight=1"], "unknown setting 'weight': expected one of scorer, "),
        ([*GENERATE, "--set", "heavy=1.5"], "heavy='1.5': expected a share"),
        ([*GENERATE, "--set", "group_size=32"], "head_dim 16"),
        ([*GENERATE, "--implementation", "nosuch"], "implementation='nosuch'"),
        ([*GENERATE, "--dtype", "int8"], "--dtype"),
        ([*GENERATE, "--temperature", "-1"], "temperature=-1.0"),
        ([*GENERATE, "--temperature", "1", "--top-p", "2"], "top_p=2.0"),
        ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens=0"),
        ([*GENERATE, "--max-new-tokens", "5000"], "1024 positions"),
        (["generate", "--model", "{model}", "--prompt", " "], "prompt is empty"),
        (["generate", "--model", "{model}", "--prompt-file", "{scratch}/nosuch.txt"], "nosuch.txt"),
        (["generate", "--model", "{model}", "--prompt-file", "{scratch}/latin1.txt"], "not UTF-8"),
        (["generate", "--model", "{model}", "--tokens-file", "{scratch}/latin1.txt"], "latin1.txt"),
        (["generate", "--model", "{model}", "--tokens-file", "{scratch}/object.json"], "expected a list"),
        (["generate", "--model", "{model}", "--tokens-file", "{scratch}/empty.json"], "empty.json is empty"),
        (["generate", "--model", "{model}", "--tokens-file", "{scratch}/outside.json"], "token id 999999"),
        (["generate", "--model", "{model}", "--chat", "--json", "{scratch}/out.json"], "--chat"),
        (["generate", "--model", "{scratch}/nosuch", "--prompt", "hello"], "does not exist"),
        ([*GENERATE, "--json", "{scratch}/nowhere/out.json"], "expected a file in a directory that exists"),
        ([*GENERATE, "--json", "{scratch}"], "expected a file in a directory that exists"),
        ([*GENERATE, "--seed", "99999999999999999999"], "expected an integer of 64 bits"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    run: Run, model_directory: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], message: str
):
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "outside.json").write_text("[999999]")
    error = run_wrongly(run, *(text.format(model=model_directory, scratch=tmp_path) for text in arguments))
    assert message in error
