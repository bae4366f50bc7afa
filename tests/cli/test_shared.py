"""Values of options that several commands take."""

import pytest

from minikv_jax.methods import lookup as presets


def test_methods_are_parsed():
    config = presets.parse("h2o:heavy=0.25,recent=512", [("recent", "3"), ("sinks", "2")])
    assert (config.name, config.heavy, config.recent, config.sinks) == ("h2o", 0.25, 512, 2)
    with pytest.raises(ValueError, match=r"NAME:KEY=VALUE.*'heavy'"):
        presets.parse("h2o:heavy")
    with pytest.raises(ValueError, match="method 'h3o'"):
        presets.parse("h3o:heavy=1")
