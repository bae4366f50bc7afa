"""Tests methods by name, and changes to them as text."""

import json
from typing import Any

import pytest
from support.tiny import tiny_config

import minikv_jax as mk
from minikv_jax.cache import memory
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Uniform
from minikv_jax.methods.grkv import Ridge
from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.hqq import HQQ
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Share, Tail, Tokens
from minikv_jax.methods.nvfp4 import NVFP4
from minikv_jax.methods.pyramidkv import Pyramid
from minikv_jax.methods.registry import from_dict, to_dict
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.twin import Twin

MINIKV = lookup.get("minikv")


def test_methods_are_known_by_name():
    assert set(lookup.names()) >= {
        *("full", "kivi-2", "kivi-4", "h2o", "snapkv", "pyramidkv", "streaming-llm", "q-hitter"),
        *("minikv", "minikv-pyramid", "minikv-variance", "minikv-snap"),
    }
    assert all(lookup.get(name).name == name and lookup.get(name).citation for name in lookup.names())
    assert lookup.resolve("minikv") is lookup.resolve(MINIKV) is MINIKV
    with pytest.raises(ValueError, match=r"'minikw': expected one of .*minikv-pyramid.* or a calibration's directory"):
        lookup.get("minikw")
    for wrong in (None, 3, H2O()):
        with pytest.raises(ValueError, match=f"method is a {type(wrong).__name__}: expected a Method or a"):
            lookup.resolve(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", lookup.names())
def test_a_method_is_read_back_from_json(name: str):
    method = lookup.get(name)
    again = from_dict(json.loads(json.dumps(to_dict(method))))
    assert again == method
    assert (again.name, again.citation) == (method.name, method.citation)
    assert lookup.override(method, {}) == method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heavy": "0.5"}, "heavy='0.5': expected a share"),
        ({"scorer": {"name": "nosuch"}}, "scorer='nosuch': expected one of .*h2o"),
        ({"scorer": {"name": "h2o", "lag": 3}}, "scorer='h2o': unknown setting 'lag': expected one of none"),
        ({"quantizer": {"name": "minmax", "k_bits": "2"}}, "quantizer='minmax': k_bits='2': expected an integer"),
        ({"quantizer": {}}, "quantizer={}: expected a name and settings"),
        ({"scorer": None}, "scorer=None: expected a name and settings"),
        ({"tail": {"length": 32, "size": 3}}, "unknown setting 'size': expected one of length, rule"),
        ({"tail": None}, "tail=None: expected"),
        ({"colour": "red"}, r"unknown fields \['colour'\], missing fields \[\]"),
    ],
)
def test_a_description_that_is_no_method_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_dict(to_dict(MINIKV) | changes)


def test_a_missing_field_is_named():
    values = to_dict(MINIKV)
    del values["sinks"]
    with pytest.raises(ValueError, match=r"missing fields \['sinks'\]"):
        from_dict(values)


CHANGES = {
    "a count": ({"heavy": "512"}, lambda m: m.heavy == Tokens(512)),
    "a share": ({"recent": "0.5"}, lambda m: m.recent == Share(0.5)),
    "one is a count": ({"recent": "1"}, lambda m: m.recent == Tokens(1)),
    "scorer": ({"scorer": "snapkv", "pooling": "mean"}, lambda m: m.scorer == SnapKV(pooling="mean")),
    "setting first": ({"pooling": "mean", "scorer": "snapkv"}, lambda m: m.scorer == SnapKV(pooling="mean")),
    "budget": ({"budget": "pyramid", "beta": "20"}, lambda m: m.budget == Pyramid(beta=20.0)),
    "bits": ({"k_bits": "4", "quantizer.v_bits": "3"}, lambda m: m.quantizer == MinMax(k_bits=4, v_bits=3)),
    "tail": ({"length": "32", "tail.rule": "kivi"}, lambda m: m.tail == Tail(length=32, rule="kivi")),
    "no quantizer": ({"quantizer": "none", "evict_every": "8"}, lambda m: (m.quantizer, m.evict_every) == (None, 8)),
    "never": ({"evict_every": "None", "sinks": "4"}, lambda m: (m.evict_every, m.sinks) == (None, 4)),
    "refit": ({"refit": "ridge", "queries": "8"}, lambda m: m.refit == Ridge(queries=8)),
    "lookahead": ({"lookahead": "16"}, lambda m: m.lookahead == 16),
    "named": ({"name": "mine", "citation": "a, b"}, lambda m: (m.name, m.citation) == ("mine", "a, b")),
    # The new quantizer does not support the old one's bits, and need not.
    "other bits": ({"quantizer": "nvfp4", "k_bits": "4", "v_bits": "4"}, lambda m: m.quantizer == NVFP4()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_are_text(case: str):
    changes, holds = CHANGES[case]
    changed = lookup.override(MINIKV, changes)
    assert holds(changed)
    assert changed != MINIKV or case == "named"


def test_a_new_component_takes_over_shared_settings():
    """Settings that the new component lacks are dropped."""
    snapkv = Method(scorer=SnapKV(observation_window=8, pooling="mean"), heavy=4, recent=4, quantizer=MinMax(k_bits=4))
    changed = lookup.override(snapkv, {"scorer": "twin", "quantizer": "hqq", "iterations": "3"})
    assert changed.scorer == Twin(observation_window=8, pooling="mean")
    assert changed.quantizer == HQQ(k_bits=4, iterations=3)
    back = lookup.override(changed, {"scorer": "h2o", "budget": "uniform"})
    assert (back.scorer, back.budget) == (H2O(), Uniform())
    with pytest.raises(ValueError, match="unknown setting 'observation_window'"):
        lookup.override(back, {"observation_window": "8"})
    same = lookup.override(snapkv, {"scorer": "snapkv"})
    assert same == snapkv


def test_a_setting_of_two_components_is_ambiguous():
    hqq = lookup.override(MINIKV, {"quantizer": "hqq", "budget": "pyramid"})
    with pytest.raises(ValueError, match=r"setting 'beta' is ambiguous: say budget\.beta or quantizer\.beta"):
        lookup.override(hqq, {"beta": "3"})
    changed = lookup.override(hqq, {"budget.beta": "3", "quantizer.beta": "9"})
    assert changed.budget == Pyramid(beta=3.0)
    assert changed.quantizer == HQQ(beta=9.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"haevy": "1"}, "unknown setting 'haevy': expected one of scorer, .*heavy.*quantizer.k_bits.*tail.length"),
        ({"tail.k_bits": "1"}, "unknown setting 'tail.k_bits'"),
        ({"sinks": "few"}, "sinks='few': expected an integer"),
        ({"sinks": "none"}, "sinks='none': expected an integer"),
        ({"evict_every": "often"}, "evict_every='often': expected an integer"),
        ({"heavy": "2.5"}, "heavy='2.5': expected a share"),
        ({"heavy": "none"}, "heavy='none': expected a share"),
        ({"heavy": "-1"}, "heavy='-1': expected a share"),
        ({"heavy": 0.3}, "heavy=0.3: expected text"),
        ({"k_bits": "two"}, "k_bits='two': expected an integer"),
        ({"k_bits": "none"}, "k_bits='none': expected an integer"),
        ({"k_bits": "5"}, "k_bits=5: expected one of 1, 2, 3, 4, 8"),
        ({"scorer": "nosuch"}, "scorer='nosuch': expected one of .*h2o.*snapkv"),
        ({"scorer": "none"}, "heavy=0.25 needs a scorer"),
        ({"quantizer": "fp8"}, "quantizer='fp8': k_bits=2: expected one of 8"),
        ({"quantizer": "none", "k_bits": "4"}, "unknown setting 'k_bits'"),
        ({"refit": "nosuch"}, "refit='nosuch': expected one of ridge"),
        ({"queries": "4"}, "unknown setting 'queries'"),
        ({"refit": "ridge", "strength": "0"}, "strength=0.0: expected"),
        ({"lookahead": "none"}, "lookahead='none': expected an integer"),
        ({"length": "100"}, "tail.length=100: expected a multiple"),
    ],
)
def test_a_wrong_change_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        lookup.override(MINIKV, changes)


def test_a_flag_is_true_or_false():
    @mk.register_scorer("flagged")
    class Flagged(H2O):
        squared: bool = True

    method = lookup.override(MINIKV, {"scorer": "flagged", "squared": "False"})
    assert method.scorer == Flagged(squared=False)
    with pytest.raises(ValueError, match="squared='0': expected true or false"):
        lookup.override(method, {"squared": "0"})


def test_a_method_and_its_changes_in_one_text():
    method = lookup.parse("h2o:heavy=0.3,recent=7", [("heavy", "0.2"), ("sinks", "4")])
    assert (method.heavy, method.recent, method.sinks) == (Share(0.3), Tokens(7), 4)  # the text takes precedence
    assert lookup.parse("h2o") == lookup.get("h2o")
    for wrong in ("h2o:heavy", "h2o:heavy=0.2,recent"):
        with pytest.raises(ValueError, match=r"expected NAME or NAME:KEY=VALUE,KEY=VALUE, got '(heavy|recent)'"):
            lookup.parse(wrong)


def test_every_door_takes_a_name_or_a_method():
    sizes: dict[str, Any] = {"prompt_length": 64, "max_new_tokens": 8}
    assert memory.report(tiny_config(), "minikv", **sizes) == memory.report(tiny_config(), MINIKV, **sizes)
