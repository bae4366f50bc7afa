"""Tests plugins that break their contracts late: one-line errors with file, line and cause."""

import functools
import pathlib
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax.methods import lookup
from minikv_jax.methods.registry import REGISTRIES, from_dict, to_dict

HEAD = "import itertools\nimport jax.numpy as jnp\nimport numpy as np\nimport minikv_jax as mk\n"  # 4 lines
SHAPE = "(i.k.shape[0], i.k.shape[2], i.k.shape[1])"


@pytest.fixture(scope="module")
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=512)


def scorer(body: str, fields: str = "pass") -> str:
    return f"""
        @mk.register_scorer("s")
        class S(mk.Scorer):
            {fields}
            def score(self, i):
                {body}
        mk.register_method(mk.Method(name="m", scorer=S(), heavy=4, recent=4))
        """


def budget(body: str) -> str:
    return f"""
        @mk.register_budget("b")
        def weights(n):
            {body}
        mk.register_method(mk.Method(name="m", scorer=mk.KNorm(), heavy=4, recent=4, budget=weights))
        """


def scored_budget(body: str) -> str:
    return f"""
        @mk.register_budget("b")
        class B(mk.ScoredBudget):
            def weights(self, scores, lengths):
                {body}
        mk.register_method(mk.Method(name="m", scorer=mk.KNorm(), heavy=4, recent=4, budget=B()))
        """


def quantizer(encode: str = "return x", decode: str = "return s", more: str = "pass", evict: str = "") -> str:
    return f"""
        @mk.register_quantizer("q")
        class Q(mk.Quantizer):
            {more}
            def encode(self, x, o):
                {encode}
            def decode(self, s, o):
                {decode}
        mk.register_method(mk.Method(name="m", quantizer=Q(), tail=mk.Tail(length=64){evict}))
        """


def write(directory: pathlib.Path, text: str) -> pathlib.Path:
    path = directory / "plugin.py"
    path.write_text(HEAD + textwrap.dedent(text).lstrip())
    return path


def use(model: mk.Llama) -> None:
    """Reads the method from text and JSON, and traces a prefill of 64 tokens and a decode step."""
    method = lookup.parse("m:recent=5")
    assert from_dict(to_dict(method)) == method
    ids, lengths = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    run = functools.partial(mk.prefill, method=method, max_new_tokens=80)
    _, cache = jax.eval_shape(run, model, ids, lengths)
    jax.eval_shape(mk.decode, model, cache, lengths, lengths)


BROKEN = {
    # A prompt length other than that of the contract checks.
    "scores of 96 tokens": (
        scorer("return jnp.zeros((i.k.shape[0], i.k.shape[2], 96))"),
        r"scorer 's' returns float32\[2, 2, 96\] \(plugin.py, line 8\): .*\[2, 2, 64\]",
    ),
    "a scorer of 96 tokens": (
        scorer(f"assert i.k.shape[1] == 96, 'only 96'; return jnp.zeros({SHAPE})"),
        r"scorer 's' fails .*\(plugin.py, line 9\): AssertionError: only 96",
    ),
    "scores are a generator": (
        scorer("return (x for x in range(3))"),
        r"scorer 's' returns a generator \(plugin.py, line 8\): expected an array \[B, K, T\]",
    ),
    "scores are a list": (scorer(f"return list(jnp.zeros({SHAPE}))"), "scorer 's' returns a list"),
    "scores are yielded": (scorer(f"yield jnp.zeros({SHAPE})"), "scorer 's' returns a generator"),
    "a scorer asks for values": (
        scorer(f"return jnp.zeros({SHAPE}) + float(i.k[0, 0, 0, 0])"),
        r"line 9\): ConcretizationTypeError",
    ),
    "a scorer raises long text": (scorer("raise RuntimeError('no ' * 10**6)"), r"line 9\): RuntimeError: (no ){100}$"),
    "a scorer raises lines": (scorer(r"raise RuntimeError('one\ntwo')"), r"line 9\): RuntimeError: one$"),
    "weights of another count": (
        budget("return [1.0] * (n + 1)"),
        r"gives \[1.0, 1.0, 1.0\] for 2 layers \(plugin.py, line 5\)",
    ),
    "endless weights": (budget("return itertools.count(1.0)"), r"gives \[1.0, 2.0, 3.0\] for 2 layers"),
    "negative weights": (budget("return -jnp.ones(n)"), "expected 2 weights, finite, not negative"),
    "weights of weights": (budget("return np.ones((n, 2))"), "budget 'b': 2 layers fails: TypeError"),
    "weights are text": (budget("return '12'"), "budget 'b': 2 layers fails: TypeError"),
    "weights are none": (budget("return None"), "budget 'b': 2 layers fails: TypeError"),
    "scored weights at 64": (
        scored_budget("return jnp.ones((len(scores), lengths.shape[0] + (scores[0].shape[2] == 64)))"),
        r"budget 'b' returns float32\[2, 3\] \(plugin.py, line 7\): .*\[L, B\]",
    ),
    "scored weights in a list": (scored_budget("return [1.0] * len(scores)"), "budget 'b' returns a list"),
    "codes at 64": (
        quantizer("return x if x.shape[2] != 64 else x[:, :, :1]"),
        r"'q': keys: encode returns float32\[2, 2, 1, 16\] for \[2, 2, 64, 16\] \(plugin.py, line 8\)",
    ),
    "codes are a generator": (quantizer("return (c for c in x)"), "'q': keys: encode returns a generator"),
    "tokens at 64": (
        quantizer(decode="return s if s.shape[2] in (32, 96) else s[:, :, :3]"),
        r"quantizer 'q': keys: decode returns float32\[2, 2, 3, 16\] \(plugin.py, line 10\)",
    ),
    "a rotation of another size": (
        quantizer(more="def rotation(self, o, h): return jnp.eye(h + 1)"),
        r"rotation returns float32\[17, 17\] \(plugin.py, line 7\): expected .*\[16, 16\]",
    ),
    "a negative block": (quantizer(more="block = -16"), r"line 12\): Q.block=-16: expected at least 1"),
    "a block of nothing": (quantizer(more="block = 0"), r"line 12\): Q.block=0: expected at least 1"),
    "half a block": (quantizer(more="block = 16.5"), r"line 12\): Q.block=16.5: expected an integer"),
    "a block that fails": (
        quantizer(more="block = property(lambda self: 1 // 0)"),
        r"line 12\): Q.block fails: ZeroDivisionError",
    ),
    "a check that fails": (
        quantizer(more="def check(self, model): {}['x']"),
        r"quantizer 'q': check fails \(plugin.py, line 7\): KeyError: 'x'",
    ),
    "a setting named heavy": (scorer("...", "heavy: int = 3"), r"line 6\): setting 'heavy' of S: a Method has a field"),
    "a setting named name": (scorer("...", "name: str = 'x'"), r"line 6\): setting 'name' of S: a Method has a field"),
    "a setting named update": (scorer("...", "update: int = 3"), r"line 6\): setting 'update' of S hides a method of"),
    "a setting that is a tuple": (
        scorer("...", "names: tuple = ('a',)"),
        r"line 6\): setting 'names' of S: expected a default that is an int",
    ),
    "a setting that is a list": (scorer("...", "names: list = []"), r"line 6\): mutable default <class 'list'>"),
    "a default out of bounds": (
        scorer("...", "lag: int = mk.setting(default=0, at_least=1)"),
        r"line 5\): scorer='s': lag=0: expected an integer at least 1",
    ),
    "a default that is not finite": (
        scorer("...", "rate: float = float('nan')"),
        r"line 5\): scorer='s': rate=nan: expected a finite number",
    ),
    "settings that fail together": (
        scorer("...", "lag: int = 0\n            def __post_init__(self): 1 // self.lag"),
        r"line 5\): scorer='s': ZeroDivisionError",
    ),
    "a name with a tab": ("mk.register_scorer('a\\tb')(print)", r"line 5\): scorer='a\\tb': expected a name"),
    "an error without words": (
        "class E(Exception):\n    def __str__(self): return self.x\nraise E",
        r"line 7\): E: no message",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_is_one_line_with_its_place(case: str, model: mk.Llama, tmp_path: pathlib.Path):
    text, message = BROKEN[case]
    before = [registry.snapshot() for registry in REGISTRIES]
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011, PT012  (its text is looked at below, without JAX's notes)
        mk.load_plugin(path)
        use(model)
    text = str(raised.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert len(text) < 700
    if text.startswith("plugin "):
        assert [registry.snapshot() for registry in REGISTRIES] == before


GOOD = {
    "weights from a generator": budget("return (1.0 + 2.0 * layer for layer in range(n))"),
    "weights from a JAX array": budget("return 1.0 + 2.0 * jnp.arange(n)"),
    "weights from NumPy": budget("return np.array([1, 3])"),
}


@pytest.mark.parametrize("case", GOOD)
def test_weights_may_be_any_numbers(case: str, model: mk.Llama, tmp_path: pathlib.Path):
    mk.load_plugin(write(tmp_path, GOOD[case]))
    use(model)
    ids, lengths = jnp.zeros((1, 64), jnp.int32), jnp.array([64])
    shapes = jax.eval_shape(
        functools.partial(mk.prefill, method=lookup.get("m"), max_new_tokens=4), model, ids, lengths
    )
    assert [layer.tail.capacity for layer in shapes[1].layers] == [2 + 4 + 4, 6 + 4 + 4]


def test_an_interrupted_plugin_registers_nothing(tmp_path: pathlib.Path):
    before = [registry.snapshot() for registry in REGISTRIES]
    path = write(tmp_path, scorer(f"return jnp.zeros({SHAPE})") + "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        mk.load_plugin(path)
    assert [registry.snapshot() for registry in REGISTRIES] == before


def test_a_setting_of_a_plugin_has_bounds(tmp_path: pathlib.Path):
    fields = "lag: int = mk.setting(default=8, at_least=1, at_most=64)"
    mk.load_plugin(write(tmp_path, scorer(f"return jnp.zeros({SHAPE})", fields)))
    changed: Any = lookup.parse("m:lag=64").scorer
    assert changed.lag == 64
    for text in ("0", "65", "٤", "1e1", "nan"):
        with pytest.raises(ValueError, match=rf"^method 'm': lag='?{text}'?: expected an integer"):
            lookup.parse(f"m:lag={text}")
    with pytest.raises(ValueError, match=r"^lag=np.int64\(65\): expected an integer in 1..64$"):
        type(changed)(lag=np.int64(65))
