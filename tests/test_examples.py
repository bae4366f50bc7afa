import pathlib
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

import minikv_jax
from minikv_jax.cache import memory
from minikv_jax.methods import base as schemes
from minikv_jax.methods import lookup as presets

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run_example(name: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model), "--max-new-tokens", "5"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_generate_prints_both_rows_and_the_bytes(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("generate.py", model_directory, monkeypatch)
    assert "bytes of cache" in capsys.readouterr().out.splitlines()[-1]


def test_chat_appends_the_second_turn_to_the_first(
    model_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_example("chat.py", model_directory, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    first, second = [int(line.strip("[").split()[0]) for line in lines if "tokens seen" in line]
    assert first >= len("Name a city by the sea.")
    assert second >= first + len("What can I see there?")


@pytest.fixture
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what a plugin registers."""
    for registry in (schemes.SCORERS, schemes.BUDGETS, schemes.QUANTIZERS, schemes.METHODS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("kind", ["scorer", "budget", "quantizer"])
def test_a_plugin_of_under_40_lines_is_a_method(kind: str):
    path = EXAMPLES / f"plugin_{kind}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    names = minikv_jax.load_plugin(path)
    assert set(names) == {kind, "method"}
    (method,) = names["method"]
    model = tiny_model(head_dim=32, max_position_embeddings=512)
    row = np.random.default_rng(0).integers(0, 96, 128).tolist()
    cache = minikv_jax.generate(model, [row], cache=method, max_new_tokens=4, eos_token_ids=()).cache
    report = memory.report(model.config, presets.get(method), prompt_length=128, max_new_tokens=4, dtype="float32")
    assert cache.nbytes == report.bytes
    assert int(cache.kept_tokens.max()) < 128
    assert int(jnp.stack([layer.packed_length for layer in cache.layers]).max()) > 0


def test_a_flax_model_that_is_not_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Under `full`, tokens are those of running the whole text at once; under `minikv`, the cache is smaller."""
    example = runpy.run_path(str(EXAMPLES / "flax_linen.py"))
    model = example["Decoder"](presets.get("full"))
    ids, lengths = np.random.default_rng(0).integers(0, 256, (2, 24)), jnp.array([24, 10])
    params = model.init(jax.random.key(1), ids[:, :8], jnp.array([8, 8]))
    tokens, _ = example["generate"](model, params, ids, lengths, 5)
    for b, length in enumerate([24, 10]):
        text = np.concatenate([ids[b, :length], tokens[b]])
        logits, _ = model.apply(params, text[None], jnp.array([length + 5]))
        np.testing.assert_array_equal(jnp.argmax(logits[0, length - 1 : -1], axis=-1), tokens[b])
    monkeypatch.setattr(sys, "argv", ["flax_linen.py", "--max-new-tokens", "3"])
    example["main"]()
    assert "of the cache saved" in capsys.readouterr().out


@pytest.mark.usefixtures("_forget")
def test_the_python_of_the_schemes_page(model_directory: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    page = (EXAMPLES.parent / "docs" / "schemes.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    exec(code.replace("smollm2-135m-instruct", str(model_directory)), {})
    assert capsys.readouterr().out.endswith(" tokens per layer\n")
    for registry in (schemes.SCORERS, schemes.BUDGETS, schemes.QUANTIZERS):  # the tables name all that there are
        for name in registry:
            assert f"`{name}`" in page or name == "none" or not registry.is_built_in(name)


def test_the_python_of_the_readme_runs(model_directory: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(code.replace("smollm2-135m-instruct", str(model_directory)), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith(" bytes")
