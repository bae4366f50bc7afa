"""The extension points: what a scheme can do, and what is said where it breaks its contract."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import cache_of, normal
from support.tiny import tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax.cache import memory
from minikv_jax.cache.state import append
from minikv_jax.methods import lookup as presets

MODEL = tiny_config()


PLUGIN = """
import jax.numpy as jnp
import minikv_jax as mk

@mk.register_scorer("late", base=0.0)
def late(inputs, config):
    tokens = inputs.k.shape[1]
    shape = (inputs.k.shape[0], inputs.k.shape[2], tokens)
    return jnp.broadcast_to(config.option("base") + jnp.arange(tokens, dtype=jnp.float32), shape)

@mk.register_budget("last-layer")
def last_layer(config, num_layers):
    return [0.0] * (num_layers - 1) + [1.0]

@mk.register_quantizer("absmax8")
class AbsMax8(mk.Quantizer):
    bits = (8,)

    def quantize(self, x, operand):
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8)
        return {"codes": codes, "scale": scale.astype(jnp.bfloat16)}

    def dequantize(self, stored, operand):
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)[..., None]

mk.register_method(mk.CacheConfig(
    name="mine", scorer="late", heavy=0.2, recent=0.2, budget="last-layer", quantizer="absmax8", k_bits=8, v_bits=8,
    residual_length=32,
))
"""


def write(directory: pathlib.Path, text: str) -> pathlib.Path:
    path = directory / "plugin.py"
    path.write_text(text)
    return path


def test_a_plugin_runs_everywhere(tmp_path: pathlib.Path):
    """Generate, ragged rows, a second turn, saved and restored; its bytes are foretold."""
    names = mk.load_plugin(write(tmp_path, PLUGIN))
    assert names == {
        "scorer": ("late",),
        "budget": ("last-layer",),
        "quantizer": ("absmax8",),
        "method": ("mine",),
    }
    assert "mine" in presets.names()
    model = tiny_model(max_position_embeddings=512)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 96, length).tolist() for length in (64, 40)]
    result = mk.generate(model, rows, cache="mine", max_new_tokens=40, eos_token_ids=())
    report = memory.report(
        model.config, presets.get("mine"), prompt_length=64, max_new_tokens=40, batch=2, dtype="float32"
    )
    assert result.cache.nbytes == report.bytes
    assert result.cache.packed_bytes == report.packed_bytes > 0
    # All of the heavy budget went to the last layer: 12 recent and 25 heavy of 64 tokens, and what was generated.
    assert np.asarray(result.cache.kept_tokens).tolist() == [[12 + 40, 8 + 40], [37 + 40, 24 + 40]]
    for row, want in zip(rows, result.tokens, strict=True):
        alone = mk.generate(model, [row], cache="mine", max_new_tokens=40, eos_token_ids=())
        np.testing.assert_array_equal(alone.tokens[0], want)
    mk.save_cache(result.cache, tmp_path / "cache")
    restored = mk.restore_cache(tmp_path / "cache", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(result.cache)
    again = mk.generate(model, [[1, 2]] * 2, cache=restored, max_new_tokens=30, eos_token_ids=())
    straight = mk.generate(model, [[1, 2]] * 2, cache=result.cache, max_new_tokens=30, eos_token_ids=())
    np.testing.assert_array_equal(again.tokens, straight.tokens)


def test_stored_as_the_quantiser_says(tmp_path: pathlib.Path):
    """What decode reads of a scheme's own layout is what its `dequantize` gives."""
    mk.load_plugin(write(tmp_path, PLUGIN))
    config = mk.CacheConfig(quantizer="absmax8", k_bits=8, v_bits=8, residual_length=32)
    rng = np.random.default_rng(1)
    k, v, q = normal(rng, 2, 96, 2, 16), normal(rng, 2, 96, 2, 16), normal(rng, 2, 4, 16)
    layer = cache_of(config, k, v, np.array([96, 64]))
    scale = np.abs(k).max(-1).astype(jnp.bfloat16).astype(np.float32)
    stored, _ = layer.packed_tokens(0, 64, jnp.float32)
    assert np.abs(np.asarray(stored) - k[:, :64].swapaxes(1, 2)).max() <= scale.max() / 127  # half a step, and bfloat16
    exact = cache_of(mk.CacheConfig(), k, v, np.array([96, 64]))
    attend = jax.jit(mk.decode_attention)
    out, want = attend(q, layer), attend(q, exact)
    assert 0 < np.abs(np.asarray(out - want)).max() < 0.05
    new = k[:, :1]
    with pytest.raises(NotImplementedError, match="quantizer='absmax8'"):
        jax.eval_shape(lambda x, n: append(layer, x, x, n, n[:, None], "cuda"), new, np.ones(2, int))


def test_settings_of_a_scheme(tmp_path: pathlib.Path):
    mk.load_plugin(write(tmp_path, PLUGIN))
    config = presets.override(presets.get("mine"), {"base": "2", "heavy": "0.3"})
    assert config.options == (("base", 2.0),)
    assert config.option("base") == 2.0
    assert presets.get("mine").option("base") == 0.0
    assert presets.override(config, {"scorer": "cumulative"}).options == ()
    with pytest.raises(ValueError, match=r"option lag=3: scorer='late'.* have base"):
        mk.CacheConfig(scorer="late", heavy=1, options={"lag": 3})
    with pytest.raises(ValueError, match="option base='a': expected float"):
        mk.CacheConfig(scorer="late", heavy=1, options={"base": "a"})
    with pytest.raises(ValueError, match=r"unknown setting 'lag'.*base"):
        presets.override(config, {"lag": "3"})


def test_a_scheme_can_be_registered_again_and_is_compiled_again():
    model = tiny_model(max_position_embeddings=512)
    row = np.random.default_rng(0).integers(0, 96, 64).tolist()
    config_of = lambda: mk.CacheConfig(scorer="ends", heavy=8, recent=1)  # noqa: E731
    kept = []
    for sign in (1.0, -1.0):

        @mk.register_scorer("ends")
        def ends(inputs: mk.ScorerInputs, config: mk.CacheConfig, sign: float = sign) -> Any:
            shape = (inputs.k.shape[0], inputs.k.shape[2], inputs.k.shape[1])
            return jnp.broadcast_to(sign * jnp.arange(shape[2], dtype=jnp.float32), shape)

        result = mk.generate(model, [row], cache=config_of(), max_new_tokens=1, eos_token_ids=())
        kept.append(np.asarray(result.cache.layers[0].tail_k)[:, :, :8])
    assert not np.array_equal(*kept)
    with pytest.raises(ValueError, match="scorer='window' is the library's own"):
        mk.register_scorer("window")(ends)


BROKEN = {
    "no file": (None, FileNotFoundError, "does not exist"),
    "syntax": ("x = 1\nx = = 2\n", ValueError, r"plugin.py \(plugin.py, line 2\): SyntaxError"),
    "import": ("\nimport no_such_module\n", ValueError, r"\(plugin.py, line 2\): ModuleNotFoundError.*no_such_module"),
    "nothing": ("x = 1\n", ValueError, "registers nothing"),
    "exit": ("import sys\nsys.exit(0)\n", ValueError, r"line 2\): SystemExit"),
    "name": ("import minikv_jax as mk\nmk.register_scorer('a b')(print)\n", ValueError, r"line 2\): scorer='a b'"),
    "method": (
        "import minikv_jax as mk\nmk.register_method(mk.CacheConfig(name='x', scorer='y'))\n",
        ValueError,
        r"line 2\): scorer='y': expected one of none, cumulative, window",
    ),
    "no method": ("import minikv_jax as mk\nmk.register_method('h2o')\n", ValueError, "'h2o': expected a CacheConfig"),
    "class": (
        "import minikv_jax as mk\n\n@mk.register_quantizer('q')\nclass A: pass\n",
        ValueError,
        "quantizer='q' is a A: expected a minikv_jax.Quantizer",
    ),
    "abstract": (
        "import minikv_jax as mk\n\n@mk.register_quantizer('q')\nclass A(mk.Quantizer): pass\n",
        ValueError,
        "TypeError: Can't instantiate abstract class A",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named(case: str, tmp_path: pathlib.Path):
    text, kind, message = BROKEN[case]
    path = tmp_path / "plugin.py" if text is None else write(tmp_path, text)
    with pytest.raises(kind, match=message):
        mk.load_plugin(path)


def shape_of(inputs: mk.ScorerInputs) -> tuple[int, int, int]:
    return inputs.k.shape[0], inputs.k.shape[2], inputs.k.shape[1]


SCORES = {
    "shape": (lambda i, c: jnp.zeros(i.k.shape[:3]), r"returns float32\[2, 96, 2\]: expected .*\[2, 2, 96\].*B, K, T"),
    "dtype": (lambda i, c: jnp.zeros(shape_of(i), jnp.int32), r"returns int32\[2, 2, 96\]"),
    "none": (lambda i, c: None, "returns a NoneType"),
    "tracing": (lambda i, c: i.v[..., 0] if i.k.sum() > 0 else i.k, r"test_schemes.py, line \d+\): TracerBoolConv"),
    "numpy": (lambda i, c: np.asarray(i.k), "TracerArrayConversionError"),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_scorer_that_breaks_its_contract_is_named(case: str):
    score, message = SCORES[case]
    mk.register_scorer("bad")(score)
    with pytest.raises(ValueError, match=f"scorer 'bad'.*{message}"):
        mk.generate(tiny_model(), [[1, 2]], cache=mk.CacheConfig(scorer="bad", heavy=1, recent=1), max_new_tokens=2)


WEIGHTS = {
    "count": (lambda c, n: [1.0], "gives .* for 2 layers: expected 2 weights"),
    "negative": (lambda c, n: [1.0, -1.0], "not negative"),
    "zero": (lambda c, n: [0.0] * n, "not all zero"),
    "nan": (lambda c, n: [1.0, float("nan")], "finite"),
    "raises": (lambda c, n: [1 / 0] * n, r"fails for 2 layers \(test_schemes.py, line \d+\): ZeroDivisionError"),
    "type": (lambda c, n: "ab", "TypeError"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_budget_that_breaks_its_contract_is_named(case: str):
    weights, message = WEIGHTS[case]
    mk.register_budget("bad")(weights)
    config = mk.CacheConfig(scorer="window", budget="bad", heavy=0.2, recent=0.2)
    with pytest.raises(ValueError, match=f"budget 'bad'.*{message}"):
        memory.report(MODEL, config, prompt_length=64, max_new_tokens=8)


def test_a_budget_from_scores_that_breaks_its_contract_is_named():
    mk.register_budget("bad", needs_scores=True)(lambda config, scores, lengths: jnp.zeros(len(scores)))
    config = mk.CacheConfig(scorer="window", budget="bad", heavy=0.2, recent=0.2)
    with pytest.raises(ValueError, match=r"budget 'bad' returns float32\[2\]: expected .*\[2, 2\].*\[L, B\]"):
        memory.check_model(MODEL, config)


def quantizer(**methods: Any) -> mk.Quantizer:
    """Stores bfloat16, but for what `methods` replaces."""
    whole = {
        "quantize": lambda self, x, operand: x.astype(jnp.bfloat16),
        "dequantize": lambda self, stored, operand: stored.astype(jnp.float32),
    }
    return type("Custom", (mk.Quantizer,), whole | methods)()


STORED = {
    "rows": ({"quantize": lambda self, x, o: x.mean(axis=2)}, r"an array of shape \[2, 2, 16\] for \[2, 2, 32, 16\]"),
    "axis": ({"quantize": lambda self, x, o: {"a": x.swapaxes(1, 2)}}, r"\['a'\] of shape \[2, 32, 2, 16\]"),
    "nothing": ({"quantize": lambda self, x, o: None}, "same pytree of arrays"),
    "shape": ({"dequantize": lambda self, s, o: s[:, :, :8]}, r"dequantize returns bfloat16\[2, 2, 8, 16\]"),
    "dtype": ({"dequantize": lambda self, s, o: s.astype(jnp.int8)}, "dequantize returns int8"),
    "raises": ({"dequantize": lambda self, s, o: s @ s}, r"fails on bfloat16\[2, 2, 32, 16\] \(test_schemes.py, line"),
    "rotation": ({"rotation": lambda self, o, h: jnp.eye(h) * 2}, "not orthogonal"),
    "block": ({"block": lambda self, c: 48}, "block=48: expected a divisor of 1024"),
}


@pytest.mark.parametrize("case", STORED)
def test_a_quantizer_that_breaks_its_contract_is_named(case: str):
    methods, message = STORED[case]
    mk.register_quantizer("bad")(quantizer(**methods))
    with pytest.raises(ValueError, match=f"quantizer.*'bad'.*{message}"):
        memory.check_model(MODEL, mk.CacheConfig(quantizer="bad", k_bits=8, v_bits=8, residual_length=96))


def test_bits_of_a_quantizer():
    narrow = quantizer()
    narrow.bits = (8,)
    mk.register_quantizer("narrow")(narrow)
    with pytest.raises(ValueError, match="quantizer='narrow': k_bits=2: expected one of None, 8"):
        mk.CacheConfig(quantizer="narrow", k_bits=2, v_bits=2)
    with pytest.raises(ValueError, match="quantizer='narrow' needs k_bits and v_bits, of 8"):
        mk.CacheConfig(quantizer="narrow")
    with pytest.raises(ValueError, match="quantizer='nosuch': expected one of minmax"):
        mk.CacheConfig(quantizer="nosuch")


def test_the_number_of_a_layer_is_asked_for():
    """A scorer's is traced; a quantiser that reads it says so, since layers may share a program otherwise."""

    @mk.register_quantizer("undeclared")
    class Undeclared(mk.Quantizer):
        bits = (16,)

        def quantize(self, x: jax.Array, operand: mk.Operand) -> jax.Array:
            return x * (1 + operand.layer)

        def dequantize(self, stored: jax.Array, operand: mk.Operand) -> jax.Array:
            return stored / (1 + operand.layer)

    @mk.register_scorer("branching")
    def branching(inputs: mk.ScorerInputs, config: mk.CacheConfig) -> jax.Array:
        del config
        norm = jnp.linalg.norm(inputs.k, axis=-1).swapaxes(1, 2)
        return norm if inputs.layer == 0 else -norm

    with pytest.raises(ValueError, match=r"'undeclared'.* sets by_layer = True"):
        memory.check_model(MODEL, mk.CacheConfig(quantizer="undeclared", k_bits=16, v_bits=16))
    with pytest.raises(ValueError, match=r"scorer 'branching' fails .*line \d+\): TracerBoolConversionError"):
        memory.check_model(MODEL, mk.CacheConfig(scorer="branching", heavy=0.5, recent=0.1))
