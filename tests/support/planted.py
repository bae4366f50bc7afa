"""Plants Python files in checkpoints, and runs a process that detects whether they are read or run."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from support.checkpoints import random_tensors, write_gguf
from support.model_directory import write_model
from support.tiny import tiny_config

from minikv_jax.models import hub

HUB_ID = "someone/planted"
AUTO_MAP = {
    "AutoConfig": "planted.Config",
    "AutoModelForCausalLM": "planted.Model",
    "AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"],
}

# Loads every source, holds a conversation with the first, and finally lets transformers run the code, as a control
# that must be detected. Prints one JSON object.
_PROGRAM = """
import json, os, sys
root, sources = os.path.realpath(sys.argv[1]), sys.argv[2:]
seen = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(root + os.sep) and path.endswith((".py", ".pyc", ".so", ".pkl", ".bin", ".pt")):
            seen.append(f"open {path}")
    elif event in ("compile", "exec"):
        name = arguments[1] if event == "compile" else arguments[0].co_filename
        if os.path.realpath(str(name)).startswith(root + os.sep):
            seen.append(f"{event} {name}")
    elif event.startswith(("subprocess.", "os.exec", "os.system", "os.posix_spawn", "pickle.find_class")):
        seen.append(event)

def report():
    files = [(name, getattr(module, "__file__", None) or "") for name, module in list(sys.modules.items())]
    modules = [name for name, file in files if os.path.realpath(file).startswith(root + os.sep)]
    result = {"seen": seen[:], "modules": modules, "marker": os.path.exists(os.path.join(root, "marker"))}
    seen.clear()
    return result

from minikv_jax.cli.main import main
from minikv_jax.models import hub
import transformers
sys.addaudithook(watch)
errors = []
for source in sources:
    try:
        hub.load_config(source)
        hub.load(source)
    except ValueError as error:
        errors.append(str(error))
main(["generate", "--model", sources[0], "--chat", "--max-new-tokens", "1", "--method", "full"])
ours = report()
transformers.AutoTokenizer.from_pretrained(sources[0], trust_remote_code=True)
print("\\n" + json.dumps({"ours": ours, "control": report(), "errors": errors}))
"""


def _plant(directory: pathlib.Path, marker: pathlib.Path, tokenizer_class: str) -> None:
    """Adds Python that writes `marker` on import, and the entries that ask transformers to import it."""
    code = (
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer, LlamaConfig as Config, LlamaModel as Model\n"
    )
    for name in ("planted.py", "__init__.py", "tokenization_planted.py", "configuration_planted.py"):
        (directory / name).write_text(code)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    for name, changes in (
        ("config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": AUTO_MAP, "tokenizer_class": tokenizer_class}),
    ):
        path = directory / name
        fields = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(fields | changes))


def write_sources(root: pathlib.Path, marker: pathlib.Path, tokenizer_class: str) -> list[str]:
    """Writes the four kinds of sources with planted files; the last is an id in the hub cache at `root / hub`."""
    directory, orbax, beside = root / "safetensors", root / "orbax", root / "gguf"
    write_model(directory)
    hub.save(*hub.load(directory), orbax)
    beside.mkdir()
    config = tiny_config(vocab_size=259, max_position_embeddings=1024)
    write_gguf(beside / "m.gguf", config, random_tensors(config), metadata=gguf_vocabulary())
    for path in (directory, orbax, orbax / "tokenizer", beside):
        _plant(path, marker, tokenizer_class)
    _write_hub_cache(root / "hub", directory)
    return [str(directory), str(orbax), str(beside / "m.gguf"), HUB_ID]


def gguf_vocabulary() -> dict[str, Any]:
    """Makes a vocabulary with one token per byte, two words, and a chat template."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [table[byte] for byte in range(256)] + ["ab", "abc", "<end>"],
        "merges": ["a b", "ab c"],
        "token_type": [1] * 258 + [3],
        "eos_token_id": 258,
    }
    template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": template}


def _write_hub_cache(cache: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes a snapshot as huggingface_hub does, with links to the repository's blobs."""
    repository, revision = cache / f"models--{HUB_ID.replace('/', '--')}", "0" * 40
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / f"{number:040}")


def watched(root: pathlib.Path, sources: list[str], hub_cache: pathlib.Path, stdin: str) -> dict[str, Any]:
    """Loads the sources in a separate process, and reports which code below `root` it touched."""
    home = {"HF_HOME": str(root / "home"), "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(root), *sources],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | home | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"stderr": result.stderr}
