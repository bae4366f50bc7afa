"""Damages files of a tiny checkpoint reproducibly; each mutation changes one file and describes the change."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from support.checkpoints import random_tensors, write_gguf
from support.planted import gguf_vocabulary
from support.tiny import tiny_config

Random = np.random.Generator
Mutation = Callable[[Random, pathlib.Path], str]

DEEP = "[" * 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 16, 64, 10**6, 10**12, 10**30, -(10**12), 2.0, 0.5, 1e-300, 1e300),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "2",
        "0.5",
        "nan",
        "x",
        "x" * 5000,
        "\x1b[2J\x07",
        "../x",
        "é\u202e",
    ),
    *([], [1], [1.5, "a"], ["full_attention"] * 2, {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, [[[[]]]]),
)
# GGUF files have no null, no objects, only 64-bit integers, and lists of one type.
GGUF_VALUES = (
    *(value for value in VALUES if isinstance(value, str | float | bool)),
    *(value for value in VALUES if type(value) is int and abs(value) < 1 << 63),
    *([1], [1, 2], ["a"], [0.5], [True], [-1] * 300, ["a"] * 259),
)
TEMPLATES = (
    *(
        "{{ nobody.name }}",
        "{% for",
        "{{ raise_exception('no') }}",
        "{{ range(10**9) | list }}",
        "{{ messages[9].role }}",
    ),
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "",
        "plain",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ [].append(1) }}",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "\ud800",
        "{{ messages }}",
        "{{ messages | tojson }}",
        "{{ x | y }}",
    ),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
)


def choose(rng: Random, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


# Bytes ----------------------------------------------------------------------------------------------------------------


def flip(rng: Random, path: pathlib.Path, start: int = 0, stop: int | None = None) -> str:
    """Changes one to four bytes between `start` and `stop`."""
    content = bytearray(path.read_bytes())
    stop = len(content) if stop is None else min(stop, len(content))
    places = sorted(int(at) for at in rng.integers(start, stop, rng.integers(1, 5)))
    for at in places:
        content[at] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    return f"{path.name}: bytes {places} changed"


def change_number(rng: Random, path: pathlib.Path, start: int) -> str:
    """Changes bytes of the float32 numbers after `start`, or makes one number NaN or infinite."""
    if rng.random() < 0.5:
        return flip(rng, path, start)
    content = bytearray(path.read_bytes())
    at = start + 4 * int(rng.integers((len(content) - start) // 4))
    number = choose(rng, (np.nan, np.inf, -np.inf))
    content[at : at + 4] = struct.pack("<f", number)
    path.write_bytes(content)
    return f"{path.name}: {number} at {at}"


def truncate(rng: Random, path: pathlib.Path) -> str:
    content = path.read_bytes()
    keep = int(rng.integers(0, len(content)))
    path.write_bytes(content[:keep])
    return f"{path.name}: {keep} of {len(content)} bytes kept"


def tear(rng: Random, path: pathlib.Path) -> str:
    """Truncates, empties or removes a file, makes it a directory, or adds bytes."""
    kind = choose(rng, ("truncate", "truncate", "empty", "unlink", "directory", "append"))
    if kind == "truncate":
        return truncate(rng, path)
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "append":
        path.write_bytes(content + rng.bytes(int(rng.integers(1, 100))))
    return f"{path.name}: {kind}"


# JSON -----------------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the paths in a JSON value, with only the first entries of long lists and objects."""
    found = [path] if path else []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, child in items[:40]:
        found += places(child, (*path, key))
    return found


def change(rng: Random, value: Any, values: Sequence[Any] = VALUES) -> str:
    """Replaces, removes, renames or adds one entry somewhere in a JSON object."""
    *parents, last = choose(rng, places(value))
    at = value
    for key in parents:
        at = at[key]
    kind = choose(rng, ("replace", "replace", "replace", "remove", "rename", "add"))
    if kind == "replace":
        at[last] = choose(rng, values)
        return f"{[*parents, last]} = {str(at[last])[:60]!r}"
    if kind == "add" or isinstance(at, list):
        new = choose(rng, ("extra", "\x1b]0;x\x07", "layer_types", "logits_scaling", "rope_scaling", "auto_map"))
        value[new] = choose(rng, values)
        return f"{new!r} added: {str(value[new])[:60]!r}"
    moved = at.pop(last)
    if kind == "rename":
        at[f"{last}_"] = moved
    return f"{[*parents, last]}: {kind}"


def json_file(name: str) -> Mutation:
    """Changes a JSON file by key and value, or as text."""

    def mutate(rng: Random, directory: pathlib.Path) -> str:
        path = directory / name
        if rng.random() < 0.75:
            value = json.loads(path.read_text())
            done = change(rng, value)
            path.write_text(json.dumps(value))
            return f"{name}: {done}"
        text = path.read_text()
        other = choose(
            rng, (DEEP, "[]", "3", "null", "", "\ufeff" + text, text[:-1], text.replace(":", ": ["), f"{text}{text}")
        )
        if rng.random() < 0.5:
            return flip(rng, path)
        path.write_text(other)
        return f"{name}: text {other[:30]!r}"

    return mutate


# Formats --------------------------------------------------------------------------------------------------------------


def safetensors_header(rng: Random, directory: pathlib.Path) -> str:
    """Changes the header's JSON and adjusts its length, or changes its bytes."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.4:
        return flip(rng, path, 0, choose(rng, (8, 8 + size)))
    header = json.loads(content[8 : 8 + size])
    done = change(rng, header, (*VALUES, "F16", "BF16", "F64", "I32", [0, 4], [48, 96], [96], [10**9, 10**9]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"safetensors header: {done}"


def safetensors_body(rng: Random, directory: pathlib.Path) -> str:
    path = directory / "model.safetensors"
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    return change_number(rng, path, 8 + size)


def torn(name: str) -> Mutation:
    return lambda rng, directory: tear(rng, directory / name)


GGUF_CONFIG = tiny_config(vocab_size=259, max_position_embeddings=1024)
_GGUF_KEYS = (
    *("general.architecture", "general.alignment", "split.count", "tokenizer.chat_template", "llama.context_length"),
    *("llama.embedding_length", "llama.feed_forward_length", "llama.block_count", "llama.attention.head_count"),
    *(
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.vocab_size",
    ),
    *(
        "llama.attention.layer_norm_rms_epsilon",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "llama.expert_count",
    ),
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.sliding_window", "llama.logit_scale"),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "merges", "token_type", "scores", "add_bos_token")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "unknown", "padding")),
)


def gguf_metadata(rng: Random, directory: pathlib.Path) -> str:
    key, value = choose(rng, _GGUF_KEYS), choose(rng, GGUF_VALUES)
    write_gguf(
        directory / "m.gguf", GGUF_CONFIG, random_tensors(GGUF_CONFIG), metadata=gguf_vocabulary() | {key: value}
    )
    return f"m.gguf: {key} = {str(value)[:60]!r}"


def _gguf_data(path: pathlib.Path) -> int:
    """Returns the offset at which tensors begin, or a little more."""
    return path.stat().st_size - sum(tensor.nbytes for tensor in random_tensors(GGUF_CONFIG).values())


def gguf_header(rng: Random, directory: pathlib.Path) -> str:
    """Changes bytes of the counts, of the metadata, or of the tensors' names, shapes, types and offsets."""
    path = directory / "m.gguf"
    infos = path.read_bytes().rindex(b"tokenizer.chat_template")
    start, stop = choose(rng, ((0, 24), (24, 800), (24, infos), (infos, _gguf_data(path))))
    return flip(rng, path, start, stop)


def gguf_body(rng: Random, directory: pathlib.Path) -> str:
    path = directory / "m.gguf"
    return change_number(rng, path, _gguf_data(path))


def orbax_file(rng: Random, directory: pathlib.Path) -> str:
    """Tears or changes any file but the config."""
    files = [path for path in directory.rglob("*") if path.is_file() and "tokenizer" not in path.parts]
    files = sorted(files, key=lambda path: (path.parent, path.stat().st_size))  # their names are random
    path = choose(rng, [path for path in files if path != directory / "config" / "metadata"])
    return flip(rng, path) if rng.random() < 0.5 and path.stat().st_size else tear(rng, path)


def chat_template(rng: Random, directory: pathlib.Path) -> str:
    path = directory / "chat_template.jinja"
    if rng.random() < 0.3:
        return flip(rng, path)
    text = choose(rng, TEMPLATES)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"chat template: {text[:60]!r}"
