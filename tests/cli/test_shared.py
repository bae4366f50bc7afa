"""Tests the values of options that several commands share."""

import pytest

from minikv_jax.methods import lookup
from minikv_jax.methods.method import Share, Tokens


def test_methods_are_parsed():
    method = lookup.parse("h2o:heavy=0.25,recent=512", [("recent", "3"), ("sinks", "2")])
    assert (method.name, method.heavy, method.recent, method.sinks) == ("h2o", Share(0.25), Tokens(512), 2)
    with pytest.raises(ValueError, match=r"NAME:KEY=VALUE.*'heavy'"):
        lookup.parse("h2o:heavy")
    with pytest.raises(ValueError, match="method 'h3o'"):
        lookup.parse("h3o:heavy=1")
