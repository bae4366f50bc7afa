"""Tests methods as values: equality, conversion of settings, and refusals."""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest

import minikv_jax as mk
from minikv_jax.methods.base import FunctionBudget, FunctionScorer
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Share, Tail, Tokens
from minikv_jax.methods.minikv import Variance
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.registry import to_dict
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.tova import TOVA


def test_a_count_is_not_a_share():
    """1 == 1.0 in Python, but programs and results of one method must not serve the other."""
    assert Tokens(1) != Share(1.0)
    share, count = Method(recent=1.0), Method(recent=1)
    assert (share.recent, count.recent) == (Share(1.0), Tokens(1))
    assert share != count
    assert share.keeps_all
    assert not count.keeps_all
    assert len({share, count, Method(recent=Tokens(1))}) == 2


def test_name_and_citation_are_not_part_of_a_methods_identity():
    """Equal methods are the same static argument and share compiled programs."""
    method = Method(name="mine", citation="a paper", scorer=H2O(), heavy=0.25, recent=0.25)
    renamed = dataclasses.replace(method, name="another", citation="")
    assert method == renamed
    assert hash(method) == hash(renamed)
    traced = []

    @functools.partial(jax.jit, static_argnames="method")
    def run(x: jax.Array, method: Method) -> jax.Array:
        traced.append(method.name)
        return x + method.sinks

    for each in (method, renamed, dataclasses.replace(method, scorer=H2O())):
        run(np.zeros(3), method=each)
    assert traced == ["mine"]
    run(np.zeros(3), method=dataclasses.replace(method, sinks=1))
    assert len(traced) == 2


def test_numpys_numbers_are_pythons():
    """A sweep over `np.arange` makes the same methods as plain numbers."""
    values: dict[str, Any] = {"heavy": np.float64(0.25), "recent": np.int64(4), "sinks": np.int32(2)}
    tail: dict[str, Any] = {"length": np.int32(32)}
    bits: dict[str, Any] = {"k_bits": np.int64(4), "v_bits": np.uint8(2)}
    given = Method(scorer=H2O(), quantizer=MinMax(**bits), tail=Tail(**tail), **values)
    plain = Method(
        scorer=H2O(), heavy=0.25, recent=4, sinks=2, quantizer=MinMax(k_bits=4, v_bits=2), tail=Tail(length=32)
    )
    assert given == plain
    assert json.loads(json.dumps(to_dict(given))) == to_dict(plain)


@pytest.mark.parametrize("bits", [True, 2.0, "2", None])
def test_bits_are_integers(bits: object):
    with pytest.raises(ValueError, match=f"k_bits={bits!r}: expected an integer"):
        MinMax(k_bits=bits, v_bits=bits)  # pyright: ignore[reportArgumentType]


def test_an_integer_will_do_for_a_float():
    assert Pyramid(beta=20) == Pyramid(beta=20.0)
    assert type(Pyramid(beta=20).beta) is float


def test_functions_are_scorers_and_budgets():
    def score(inputs: mk.LayerInputs) -> jax.Array:
        return -inputs.k[..., 0].swapaxes(1, 2)

    def weights(num_layers: int) -> list[float]:
        return [float(layer + 1) for layer in range(num_layers)]

    method = Method(scorer=score, budget=weights, heavy=4, recent=1)
    assert method == Method(
        scorer=FunctionScorer(function=score), budget=FunctionBudget(function=weights), heavy=4, recent=1
    )
    assert method.budget.weights(3) == [1.0, 2.0, 3.0]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("budget", "tokens", "granted"),
    [(Share(0.25), 2, 2), (Share(1.0), 10, 10), (Tokens(4), 4, 4), (Tokens(40), 10, 40)],
)
def test_only_a_count_may_exceed_the_prompt(budget: Share | Tokens, tokens: int, granted: int):
    assert budget.tokens(10) == tokens
    assert budget.granted(10) == granted
    assert bool(budget)
    assert not Share(0.0)
    assert not Tokens(0)


SCORED: dict[str, Any] = {"scorer": H2O(), "heavy": 0.25, "recent": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "h2o"}, "scorer='h2o': expected an instance of a Scorer class"),
        ({"scorer": H2O}, "scorer=.*H2O.*: expected an instance"),
        ({"heavy": 1.5}, r"heavy=1.5: expected a share \(float in 0..1\) or a token count \(int in 0..16777216\)"),
        ({"heavy": -0.1}, "heavy=-0.1"),
        ({"heavy": -3}, "heavy=-3"),
        ({"heavy": float("nan")}, "heavy=nan"),
        ({"heavy": True}, "heavy=True"),
        ({"heavy": "0.5"}, "heavy='0.5'"),
        ({"recent": 2.0}, "recent=2.0"),
        ({"heavy": 0.6, "recent": 0.5}, "heavy=0.6 .* recent=0.5: shares of the prompt may not sum over 1"),
        ({"scorer": mk.lookup.get("full").scorer}, "heavy=0.25 needs a scorer"),
        ({"sinks": -1}, "sinks=-1: expected an integer in 0..16777216"),
        ({"sinks": 1.5}, "sinks=1.5: expected an integer"),
        ({"budget": "pyramid"}, "budget='pyramid': expected an instance of a Budget or ScoredBudget class"),
        ({"quantizer": "minmax"}, "quantizer='minmax': expected a Quantizer or None"),
        ({"tail": 128}, "tail=128: expected a Tail"),
        ({"quantizer": MinMax(), "tail": Tail(length=100)}, "tail.length=100: expected a multiple of MinMax's .* 16"),
        # 1 bit: 32 tokens to a word
        ({"quantizer": MinMax(k_bits=2, v_bits=1), "tail": Tail(length=48)}, "tail.length=48: .* 32"),
        ({"evict_every": 0}, "evict_every=0: expected an integer in 1..16777216 or none"),
        ({"evict_every": 1, "quantizer": MinMax()}, "evict_every=1 with MinMax: only full-precision tokens can leave"),
        ({"evict_every": 1, "heavy": 0, "recent": 1.0}, "evict_every=1 with recent=1.0: there is no budget"),
        ({"evict_every": 1, "scorer": SnapKV()}, "evict_every=1 with SnapKV: expected a scorer that goes on .*H2O"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Method(**SCORED | changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pyramid(beta=0.5), "beta=0.5: expected a finite number at least 1"),
        (lambda: Pyramid(beta="7"), "beta='7': expected a finite number"),  # pyright: ignore[reportArgumentType]
        (lambda: Variance(cap=float("nan")), "cap=nan: expected a finite number at least 1 and at most 1024"),
        (lambda: MinMax(k_bits=5), "k_bits=5: expected one of 1, 2, 3, 4, 8"),
        (lambda: MinMax(v_bits=6), "v_bits=6: expected one of"),
        (lambda: MinMax(group_size=48), "group_size=48: expected one of 16, 32, 64, 128"),
        (lambda: MinMax(metadata_dtype="float32"), "metadata_dtype='float32': expected one of float16, bfloat16"),
        (lambda: Tail(rule="none"), "rule='none': expected one of minikv, kivi"),
        (lambda: Tail(length=0), "length=0: expected an integer in 1..65536"),
        (lambda: Tail(length=True), "length=True: expected an integer"),
        (lambda: Share(1), r"Share\(1\): expected a float in 0..1"),
        (lambda: Tokens(0.5), "count=0.5: expected an integer"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_wrong_setting_is_refused_by_its_component(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_scorers_that_go_on_may_evict_during_generation():
    for scorer in (H2O(), TOVA()):
        assert Method(scorer=scorer, heavy=0.1, recent=0.1, evict_every=16).evict_every == 16
    assert Method(recent=100, sinks=4, evict_every=1).evict_every == 1  # by position
