"""Fuzzes every kind of checkpoint file: damaged checkpoints load correctly or are refused in one line."""

from __future__ import annotations

import collections
import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from flax import nnx
from support import mutations
from support.checkpoints import random_tensors, write_gguf, write_hf
from support.model_directory import byte_tokenizer, write_model
from support.planted import gguf_vocabulary
from support.tiny import tiny_config

from minikv_jax.models import chat, hub
from minikv_jax.models.decoder import Llama
from minikv_jax.models.rotary import inverse_frequencies

SEED = 21
SECONDS = 5
LONGEST = 2000  # maximum length of an error, in characters
NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")


class Kind(NamedTuple):
    """A way to damage a checkpoint.

    Attributes:
      source: kind of checkpoint, of `sources`.
      weights_change: whether the damaged checkpoint may load with other weights.
    """

    source: str
    mutate: mutations.Mutation
    weights_change: bool = False


KINDS = {
    "config.json": Kind("hf", mutations.json_file("config.json")),
    "generation_config.json": Kind("hf", mutations.json_file("generation_config.json")),
    "tokenizer.json": Kind("hf", mutations.json_file("tokenizer.json")),
    "tokenizer_config.json": Kind("hf", mutations.json_file("tokenizer_config.json")),
    "chat template": Kind("hf", mutations.chat_template),
    "safetensors header": Kind("hf", mutations.safetensors_header),
    "safetensors body": Kind("hf", mutations.safetensors_body, weights_change=True),
    "safetensors torn": Kind("hf", mutations.torn("model.safetensors")),
    "index": Kind("shards", mutations.json_file("model.safetensors.index.json")),
    "shard torn": Kind("shards", mutations.torn("model-00002-of-00002.safetensors")),
    "gguf metadata": Kind("gguf", mutations.gguf_metadata),
    "gguf header": Kind("gguf", mutations.gguf_header),
    "gguf body": Kind("gguf", mutations.gguf_body, weights_change=True),
    "gguf torn": Kind("gguf", mutations.torn("m.gguf")),
    "orbax config": Kind("orbax", mutations.json_file("config/metadata")),
    "orbax tokenizer": Kind("orbax", mutations.json_file("tokenizer/tokenizer_config.json")),
    "orbax files": Kind("orbax", mutations.orbax_file, weights_change=True),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Makes a directory of intact checkpoints by kind."""
    root = tmp_path_factory.mktemp("intact")
    write_model(root / "hf")
    (root / "hf" / "generation_config.json").write_text('{"eos_token_id": [3, 5], "temperature": 0.7}')
    config = tiny_config()
    write_hf(root / "shards", config, random_tensors(config), shards=2)
    (root / "gguf").mkdir()
    write_gguf(
        root / "gguf" / "m.gguf",
        mutations.GGUF_CONFIG,
        random_tensors(mutations.GGUF_CONFIG),
        metadata=gguf_vocabulary(),
    )
    hub.save(hub.load(root / "hf")[0], byte_tokenizer(), root / "orbax")
    return root


def load(directory: pathlib.Path) -> tuple[Llama, Any]:
    return hub.load(directory / "m.gguf" if (directory / "m.gguf").exists() else directory)


def weights(model: Llama) -> dict[str, np.ndarray]:
    return {".".join(map(str, at)): np.asarray(leaf[...]) for at, leaf in nnx.to_flat_state(nnx.state(model))}


def outcome(directory: pathlib.Path, kind: Kind, intact: Llama) -> str:
    """Tells whether the model is the same, another valid one, or refused in one line; fails otherwise."""
    try:
        model, tokenizer = load(directory)
        if tokenizer is not None:
            assert all(type(token) is int for token in tokenizer.encode("hello 1"))
            assert isinstance(tokenizer.decode([1, 2]), str)
            if tokenizer.chat_template is not None:
                assert chat.first_turn(tokenizer, "hello")
    except (ValueError, OSError) as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < LONGEST, text
        assert str(directory) in text, text
        return "refused"
    found, expected = weights(model), weights(intact)
    assert all(np.isfinite(array).all() for array in found.values())
    same = found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)
    assert same or kind.weights_change
    for name in ("config.json", "config/metadata"):
        if (directory / name).is_file():
            check_fields(json.loads((directory / name).read_text()), model)
    return "same" if same and model.config == intact.config else "other"


def check_fields(fields: dict[str, Any], model: Llama) -> None:
    """Checks that the model has the values of the config, without conversions."""
    for name in ("model_type", "hidden_act", *NUMBERS, *FLAGS):
        value = fields.get(name)
        if value is not None:
            assert value == getattr(model.config, name), name
            assert isinstance(value, bool) == (name in FLAGS), name
    assert np.isfinite(inverse_frequencies(model.config.rope(0))).all()


def campaign(sources: pathlib.Path, scratch: pathlib.Path, name: str, count: int) -> collections.Counter[str]:
    """Applies mutations 0 to `count - 1` of a kind, and counts the outcomes."""
    kind, counts, failures = KINDS[name], collections.Counter(), []
    intact = load(sources / kind.source)[0]
    for number in range(count):
        directory = scratch / f"{number}"
        shutil.copytree(sources / kind.source, directory)
        done, begin = kind.mutate(np.random.default_rng([SEED, number]), directory), time.perf_counter()
        try:
            counts[outcome(directory, kind, intact)] += 1
        except Exception as error:
            failures.append(f"{name} {number}, {done}: {type(error).__name__}: {str(error)[:LONGEST]}")
        if time.perf_counter() - begin > SECONDS:
            failures.append(f"{name} {number}, {done}: {time.perf_counter() - begin:.1f} s")
        shutil.rmtree(directory)
    print(f"{name}: {dict(counts)}")
    assert not failures, "\n".join(failures)
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_read_right(sources: pathlib.Path, tmp_path: pathlib.Path, name: str):
    assert campaign(sources, tmp_path, name, 6).total() == 6


@pytest.mark.campaign
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_refused_or_read_right(sources: pathlib.Path, tmp_path: pathlib.Path, name: str):
    counts = campaign(sources, tmp_path, name, 60)
    assert counts["refused"] > 0


@pytest.mark.parametrize("source", ["hf", "shards", "gguf", "orbax"])
def test_what_is_intact_is_the_same(sources: pathlib.Path, source: str):
    assert outcome(sources / source, Kind(source, lambda rng, directory: ""), load(sources / source)[0]) == "same"
