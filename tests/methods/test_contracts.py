"""Tests user-defined components: a plugin in use, and errors for broken contracts."""

import itertools
import os
import pathlib
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import cache_of, normal
from support.tiny import tiny_config, tiny_model

import minikv_jax as mk
from minikv_jax.cache import memory
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.registry import REGISTRIES
from minikv_jax.models.decoder import Llama

MODEL = tiny_config()


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=512)


PLUGIN = """
import jax.numpy as jnp
import minikv_jax as mk

@mk.register_scorer("late")
class Late(mk.Scorer):
    base: float = 0.0

    def score(self, inputs):
        tokens = inputs.k.shape[1]
        shape = (inputs.k.shape[0], inputs.k.shape[2], tokens)
        return jnp.broadcast_to(self.base + jnp.arange(tokens, dtype=jnp.float32), shape)

@mk.register_budget("last-layer")
def last_layer(num_layers):
    return [0.0] * (num_layers - 1) + [1.0]

@mk.register_quantizer("absmax8")
class AbsMax8(mk.Quantizer):
    choices = (8,)
    k_bits: int = 8
    v_bits: int = 8

    def encode(self, x, operand):
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8)
        return {"codes": codes, "scale": scale.astype(jnp.bfloat16)}

    def decode(self, stored, operand):
        return stored["codes"].astype(jnp.float32) * stored["scale"].astype(jnp.float32)[..., None]

mk.register_method(mk.Method(
    name="mine", scorer=Late(), heavy=0.2, recent=0.2, budget=last_layer, quantizer=AbsMax8(), tail=mk.Tail(length=32),
))
"""


def write(directory: pathlib.Path, text: str) -> pathlib.Path:
    path = directory / "plugin.py"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_plugin_runs_everywhere(model: Llama, tmp_path: pathlib.Path):
    """It generates, continues, is saved and restored, with ragged rows and predicted bytes."""
    names = mk.load_plugin(write(tmp_path, PLUGIN))
    assert names == {
        "scorer": ("late",),
        "budget": ("last-layer",),
        "quantizer": ("absmax8",),
        "method": ("mine",),
    }
    assert "mine" in lookup.names()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 96, length).tolist() for length in (64, 40)]
    result = mk.generate(model, rows, method="mine", max_new_tokens=40, eos_token_ids=())
    report = memory.report(model.config, "mine", prompt_length=64, max_new_tokens=40, batch=2, dtype="float32")
    assert result.cache.nbytes == report.bytes
    assert result.cache.packed_bytes == report.packed_bytes > 0
    # The last layer has the whole heavy budget: 12 recent and 25 heavy of 64 tokens, and the generated ones.
    assert np.asarray(result.cache.kept_tokens).tolist() == [[12 + 40, 8 + 40], [37 + 40, 24 + 40]]
    for row, want in zip(rows, result.tokens, strict=True):
        alone = mk.generate(model, [row], method="mine", max_new_tokens=40, eos_token_ids=())
        np.testing.assert_array_equal(alone.tokens[0], want)
    mk.save_cache(result.cache, tmp_path / "cache")
    restored = mk.restore_cache(tmp_path / "cache", model.config)
    assert jax.tree.structure(restored) == jax.tree.structure(result.cache)
    again = mk.generate(model, [[1, 2]] * 2, cache=restored, max_new_tokens=30, eos_token_ids=())
    straight = mk.generate(model, [[1, 2]] * 2, cache=result.cache, max_new_tokens=30, eos_token_ids=())
    np.testing.assert_array_equal(again.tokens, straight.tokens)


def test_what_is_read_is_what_the_quantizer_decodes(tmp_path: pathlib.Path):
    mk.load_plugin(write(tmp_path, PLUGIN))
    method = mk.Method(quantizer=lookup.get("mine").quantizer, tail=mk.Tail(length=32))
    rng = np.random.default_rng(1)
    k, v, q = normal(rng, 2, 96, 2, 16), normal(rng, 2, 96, 2, 16), normal(rng, 2, 4, 16)
    layer = cache_of(method, k, v, np.array([96, 64]))
    scale = np.abs(k).max(-1).astype(jnp.bfloat16).astype(np.float32)
    stored, _ = layer.packed_tokens(0, 64, jnp.float32)
    assert np.abs(np.asarray(stored) - k[:, :64].swapaxes(1, 2)).max() <= scale.max() / 127  # half a step, and bfloat16
    exact = cache_of(mk.Method(), k, v, np.array([96, 64]))
    attend = jax.jit(mk.decode_attention)
    out, want = attend(q, layer), attend(q, exact)
    assert 0 < np.abs(np.asarray(out - want)).max() < 0.05
    new = k[:, :1]
    with pytest.raises(NotImplementedError, match="AbsMax8"):
        jax.eval_shape(lambda x, n: mk.append(layer, x, x, n, n[:, None], "cuda"), new, np.ones(2, int))


def test_settings_of_a_component_of_ones_own(tmp_path: pathlib.Path):
    mk.load_plugin(write(tmp_path, PLUGIN))
    mine = lookup.get("mine")
    changed: Any = lookup.override(mine, {"base": "2", "heavy": "0.3"})
    assert changed.scorer.base == 2.0
    assert mine.scorer == type(changed.scorer)()  # unchanged
    with pytest.raises(ValueError, match="base='a': expected a finite number"):
        lookup.override(mine, {"base": "a"})
    with pytest.raises(ValueError, match=r"unknown setting 'lag'.*scorer\.base"):
        lookup.override(mine, {"lag": "3"})
    with pytest.raises(ValueError, match=r"base='a': expected a finite number"):
        type(changed.scorer)(base="a")


def ends(sign: float) -> type[mk.Scorer]:
    class Ends(mk.Scorer):
        def score(self, inputs: mk.LayerInputs) -> jax.Array:
            return jnp.broadcast_to(sign * jnp.arange(inputs.k.shape[1], dtype=jnp.float32), shape_of(inputs))

    return Ends


def test_a_name_can_be_registered_again_and_is_compiled_again(model: Llama):
    row = np.random.default_rng(0).integers(0, 96, 64).tolist()
    base = mk.Method(scorer=mk.H2O(), heavy=8, recent=1)
    kept = []
    for sign in (1.0, -1.0):
        mk.register_scorer("ends")(ends(sign))
        method = lookup.override(base, {"scorer": "ends"})
        result = mk.generate(model, [row], method=method, max_new_tokens=1, eos_token_ids=())
        kept.append(np.asarray(result.cache.parts[0].tail.k)[:, :, :8])
    assert not np.array_equal(*kept)


@pytest.mark.parametrize("name", ["snapkv", "none", "h2o"])
def test_a_name_of_the_librarys_own_cannot_be_taken(name: str):
    with pytest.raises(ValueError, match=f"scorer='{name}' is the library's own"):
        mk.register_scorer(name)(ends(1.0))


def test_functions_need_no_name(model: Llama):
    """A method accepts plain functions; registered ones also have a name."""

    def newest(inputs: mk.LayerInputs) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(inputs.k.shape[1], dtype=jnp.float32), shape_of(inputs))

    def first_layer(num_layers: int) -> list[float]:
        return [1.0] + [0.0] * (num_layers - 1)

    method = mk.Method(scorer=newest, budget=first_layer, heavy=4, recent=4)
    row = np.random.default_rng(0).integers(0, 96, 64).tolist()
    result = mk.generate(model, [row], method=method, max_new_tokens=2, eos_token_ids=())
    assert result.cache.kept_tokens.tolist() == [[8 + 4 + 2], [4 + 2]]
    mk.register_scorer("newest")(newest)
    mk.register_budget("first-layer")(first_layer)
    by_name = lookup.override(lookup.get("h2o"), {"scorer": "newest", "budget": "first-layer", "heavy": "4"})
    assert lookup.override(by_name, {"recent": "4"}) == method


BROKEN = {
    "no file": (None, FileNotFoundError, "does not exist"),
    "syntax": ("x = 1\nx = = 2\n", ValueError, r"plugin.py \(plugin.py, line 2\): SyntaxError"),
    "import": ("\nimport no_such_module\n", ValueError, r"\(plugin.py, line 2\): ModuleNotFoundError.*no_such_module"),
    "nothing": ("x = 1\n", ValueError, "registers nothing"),
    "exit": ("import sys\nsys.exit(0)\n", ValueError, r"line 2\): SystemExit"),
    "name": ("import minikv_jax as mk\nmk.register_scorer('a b')(print)\n", ValueError, r"line 2\): scorer='a b'"),
    "method": (
        "import minikv_jax as mk\nmk.register_method(mk.Method(name='x', scorer='y'))\n",
        ValueError,
        r"line 2\): scorer='y': expected an instance of a Scorer class, or a function",
    ),
    "no method": ("import minikv_jax as mk\nmk.register_method('h2o')\n", ValueError, "'h2o': expected a Method"),
    "class": (
        "import minikv_jax as mk\n\n@mk.register_quantizer('q')\nclass A: pass\n",
        ValueError,
        "quantizer='q' is A: expected a subclass of minikv_jax.Quantizer",
    ),
    "function": (
        "import minikv_jax as mk\nmk.register_quantizer('q')(print)\n",
        ValueError,
        "quantizer='q' is builtin_function_or_method: expected a subclass of minikv_jax.Quantizer",
    ),
    "abstract": (
        "import minikv_jax as mk\n\n@mk.register_quantizer('q')\nclass A(mk.Quantizer): pass\n",
        ValueError,
        "quantizer='q': TypeError: Can't instantiate abstract class A",
    ),
    "default": (
        "import minikv_jax as mk\n\n@mk.register_scorer('s')\nclass A(mk.Scorer):\n    lag: int\n    score = print\n",
        ValueError,
        "scorer='s': TypeError: .*missing.*'lag'",
    ),
    "wrong default": (
        "import minikv_jax as mk\n\n@mk.register_quantizer('q')\nclass A(mk.Quantizer):\n    choices = (8,)\n"
        "    encode = decode = print\n",
        ValueError,
        "quantizer='q': k_bits=2: expected one of 8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named(case: str, tmp_path: pathlib.Path):
    text, kind, message = BROKEN[case]
    path = tmp_path / "plugin.py" if text is None else write(tmp_path, text)
    with pytest.raises(kind, match=message):
        mk.load_plugin(path)


def test_a_plugin_that_fails_half_way_registers_nothing(tmp_path: pathlib.Path):
    before = [registry.snapshot() for registry in REGISTRIES]
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        mk.load_plugin(write(tmp_path, PLUGIN + "\n1 / 0\n"))
    assert [registry.snapshot() for registry in REGISTRIES] == before
    assert "mine" not in lookup.names()
    assert set(mk.load_plugin(write(tmp_path, PLUGIN))) == {"scorer", "budget", "quantizer", "method"}


def test_an_edited_plugin_runs_as_it_is_now(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Python would take the bytecode that it stored, if the file is as long and of the same second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    text = (
        "import minikv_jax as mk\nmk.register_method(mk.Method(name='mine', scorer=mk.H2O(), heavy=0.{}, recent=0.1))\n"
    )
    for digit in (1, 2):
        path = write(tmp_path, text.format(digit))
        os.utime(path, (10**9, 10**9))
        mk.load_plugin(path)
        assert lookup.get("mine").heavy == mk.Share(digit / 10)


def shape_of(inputs: mk.LayerInputs) -> tuple[int, int, int]:
    return inputs.k.shape[0], inputs.k.shape[2], inputs.k.shape[1]


SCORES = {
    "shape": (
        lambda i: jnp.zeros(i.k.shape[:3]),
        r"returns float32\[2, 96, 2\] \(test_contracts.py, line \d+\): expected .*\[2, 2, 96\].*B, K, T",
    ),
    "dtype": (lambda i: jnp.zeros(shape_of(i), jnp.int32), r"returns int32\[2, 2, 96\]"),
    "none": (lambda i: None, "returns a NoneType"),
    "tracing": (lambda i: i.v[..., 0] if i.k.sum() > 0 else i.k, r"\(test_contracts.py, line \d+\): TracerBoolConv"),
    "numpy": (lambda i: np.asarray(i.k), "TracerArrayConversionError"),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_scorer_that_breaks_its_contract_is_named(case: str):
    score, message = SCORES[case]
    mk.register_scorer("bad")(score)
    with pytest.raises(ValueError, match=f"scorer 'bad'.*{message}"):
        contracts.check(mk.Method(scorer=score, heavy=1, recent=1), MODEL)


@pytest.mark.parametrize(
    ("windows", "message"), [((32, 0), r"is \(32, 0\): expected numbers"), (7, "fails.*TypeError")]
)
def test_vote_windows_that_break_their_contract_are_named(windows: Any, message: str):
    class Voted(mk.SnapKV):
        @property
        def vote_windows(self) -> tuple[int, ...]:
            return windows

    with pytest.raises(ValueError, match=f"scorer 'Voted': vote_windows {message}"):
        contracts.check(mk.Method(scorer=Voted(), heavy=1, recent=1), MODEL)


def test_a_second_stage_that_breaks_its_contract_is_named():
    class Second(mk.SnapKV):
        share: float = 0.5

        @property
        def first_share(self) -> float:
            return self.share

        def rescore(self, inputs: mk.LayerInputs, scores: jax.Array) -> jax.Array:
            return scores[0]

    for share, message in (
        (1.5, "scorer 'Second': first_share is 1.5: expected a number in 0..1"),
        (0.5, r"scorer 'Second': rescore returns float32\[2, 96\] .*: expected .*B, K, T"),
    ):
        with pytest.raises(ValueError, match=message):
            contracts.check(mk.Method(scorer=Second(share=share), heavy=1, recent=1), MODEL)
    contracts.check(mk.Method(scorer=Second(share=1.0), heavy=1, recent=1), MODEL)  # not called


def test_an_update_that_breaks_its_contract_is_named():
    class Late(mk.H2O):
        def update(self, scores: jax.Array, weights: jax.Array) -> jax.Array:
            return weights[..., 0]

    with pytest.raises(ValueError, match=r"scorer 'Late': update returns float32\[2, 2\] .*: expected .*B, K, C"):
        contracts.check(mk.Method(scorer=Late(), heavy=1, recent=1, evict_every=1), MODEL)
    contracts.check(mk.Method(scorer=Late(), heavy=1, recent=1), MODEL)  # not called


def test_contracts_are_checked_before_anything_runs(model: Llama):
    def keys(inputs: mk.LayerInputs) -> jax.Array:
        return inputs.k

    method = mk.Method(scorer=keys, heavy=1, recent=1)
    with pytest.raises(ValueError, match="scorer 'keys' returns"):
        mk.generate(model, [[1, 2]], method=method, max_new_tokens=2)
    with pytest.raises(ValueError, match="scorer 'keys' returns"):
        memory.report(MODEL, method, prompt_length=64, max_new_tokens=8)


WEIGHTS = {
    "count": (lambda n: [1.0], "gives .* for 2 layers .*: expected 2 weights"),
    "negative": (lambda n: [1.0, -1.0], "not negative"),
    "zero": (lambda n: [0.0] * n, "not all zero"),
    "nan": (lambda n: [1.0, float("nan")], "finite"),
    "raises": (lambda n: [1 / 0] * n, r"2 layers fails \(test_contracts.py, line \d+\): ZeroDivisionError"),
    "type": (lambda n: "12", "TypeError"),
    "none": (lambda n: None, "TypeError"),
    "endless": (lambda n: itertools.count(1.0), r"gives \[1.0, 2.0, 3.0\] for 2 layers"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_budget_that_breaks_its_contract_is_named(case: str):
    weights, message = WEIGHTS[case]
    mk.register_budget("bad")(weights)
    method = mk.Method(scorer=mk.SnapKV(), budget=weights, heavy=0.2, recent=0.2)
    with pytest.raises(ValueError, match=f"budget 'bad'.*{message}"):
        contracts.check(method, MODEL)


def test_a_budget_from_scores_that_breaks_its_contract_is_named():
    @mk.register_budget("bad")
    class Flat(mk.ScoredBudget):
        def weights(self, scores: Any, lengths: jax.Array) -> jax.Array:
            del lengths
            return jnp.zeros(len(scores))

    method = mk.Method(scorer=mk.SnapKV(), budget=Flat(), heavy=0.2, recent=0.2)
    with pytest.raises(ValueError, match=r"budget 'bad' returns float32\[2\] .*: expected .*\[2, 2\].*\[L, B\]"):
        contracts.check(method, MODEL)


def bfloat16(**methods: Any) -> mk.Quantizer:
    """Makes a quantizer that stores bfloat16, with `methods` replaced."""
    members = {
        "encode": lambda self, x, operand: x.astype(jnp.bfloat16),
        "decode": lambda self, stored, operand: stored.astype(jnp.float32),
    }
    return type("Custom", (mk.Quantizer,), members | methods)()


STORED = {
    "rows": ({"encode": lambda self, x, o: x.mean(axis=2)}, r"encode returns float32\[2, 2, 16\] for \[2, 2, 96, 16\]"),
    "axis": ({"encode": lambda self, x, o: {"a": x.swapaxes(1, 2)}}, r"encode returns float32\[2, 32, 2, 16\]\['a'\]"),
    "nothing": ({"encode": lambda self, x, o: None}, "encode returns a NoneType"),
    "shape": ({"decode": lambda self, s, o: s[:, :, :8]}, r"decode returns bfloat16\[2, 2, 8, 16\]"),
    "dtype": ({"decode": lambda self, s, o: s.astype(jnp.int8)}, "decode returns int8"),
    "raises": ({"decode": lambda self, s, o: s @ s}, r"fails on bfloat16\[2, 2, 32, 16\] \(test_contracts.py, line"),
    "rotation": ({"rotation": lambda self, o, h: jnp.eye(h) * 2}, "not orthogonal"),
}


@pytest.mark.parametrize("case", STORED)
def test_a_quantizer_that_breaks_its_contract_is_named(case: str):
    methods, message = STORED[case]
    quantizer = bfloat16(**methods)
    mk.register_quantizer("bad")(type(quantizer))
    with pytest.raises(ValueError, match=f"quantizer 'bad'.*{message}"):
        contracts.check(mk.Method(quantizer=quantizer, tail=mk.Tail(length=96)), MODEL)


def test_a_packing_block_divides_what_is_read_at_a_time():
    with pytest.raises(ValueError, match=r"Custom\.block=48: expected a divisor of 1024"):
        mk.Method(quantizer=bfloat16(block=property(lambda self: 48)), tail=mk.Tail(length=96))


def test_bits_of_a_quantizer():
    narrow = type(bfloat16(choices=(2, 8)))
    assert narrow(k_bits=8, v_bits=8).bits("keys") == 8
    with pytest.raises(ValueError, match="k_bits=4: expected one of 2, 8"):
        narrow(k_bits=4)
    mk.register_quantizer("narrow")(narrow)
    with pytest.raises(ValueError, match="quantizer='narrow': k_bits=4: expected one of 2, 8"):
        lookup.override(lookup.get("kivi-4"), {"quantizer": "narrow"})
    with pytest.raises(ValueError, match=r"quantizer='nosuch': expected one of .*minmax, narrow"):
        lookup.override(lookup.get("kivi-4"), {"quantizer": "nosuch"})


def test_the_number_of_a_layer_is_asked_for():
    """A scorer's is traced. A quantizer must declare that it reads it, because layers may share a program."""

    class Undeclared(mk.Quantizer):
        def encode(self, x: jax.Array, operand: mk.Operand) -> jax.Array:
            return x * (1 + operand.layer)  # pyright: ignore[reportOperatorIssue]

        def decode(self, stored: jax.Array, operand: mk.Operand) -> jax.Array:
            return stored / (1 + operand.layer)  # pyright: ignore[reportOperatorIssue]

    class Declared(Undeclared):
        by_layer: ClassVar[bool] = True

    def branching(inputs: mk.LayerInputs) -> jax.Array:
        norm = jnp.linalg.norm(inputs.k, axis=-1).swapaxes(1, 2)
        return norm if inputs.layer == 0 else -norm

    with pytest.raises(ValueError, match=r"'Undeclared'.* says by_layer = True"):
        contracts.check(mk.Method(quantizer=Undeclared()), MODEL)
    contracts.check(mk.Method(quantizer=Declared()), MODEL)
    with pytest.raises(ValueError, match=r"scorer 'branching' fails .*line \d+\): TracerBoolConversionError"):
        contracts.check(mk.Method(scorer=branching, heavy=0.5, recent=0.1), MODEL)


def test_only_a_quantizer_that_keeps_a_rule_claims_its_kernels():
    """A kernel packs by min/max and must not replace a subclass that encodes in another way."""

    class Wider(mk.MinMax):
        def encode(self, x: jax.Array, operand: mk.Operand) -> Any:
            return super().encode(2 * x, operand)

    class Reader(mk.MinMax):
        def decode(self, stored: Any, operand: mk.Operand) -> jax.Array:
            return super().decode(stored, operand) / 2

    class Settled(mk.MinMax):
        group_size: int = 32

    class Faster(Wider):
        kernel_packs: ClassVar[bool] = True

        def encode(self, x: jax.Array, operand: mk.Operand) -> Any:
            return mk.MinMax.encode(self, x, operand)

    claims = {kind.__name__: (kind.kernel_packs, kind.kernel_reads) for kind in (Wider, Reader, Settled, Faster)}
    assert claims == {"Wider": (False, True), "Reader": (True, False), "Settled": (True, True), "Faster": (True, True)}
