import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from minikv_jax.methods.config import CacheConfig


def test_a_count_is_not_a_share():
    """1 == 1.0 in Python: programs compiled for a method, and its results, must not serve the other."""
    share, count = CacheConfig(recent=1.0), CacheConfig(recent=1)
    assert share != count
    assert len({share, count, CacheConfig(recent=1)}) == 2


def test_numpys_numbers_are_pythons():
    """A sweep over `np.arange` gives the methods that plain numbers give."""
    values: dict[str, Any] = {"heavy": np.float64(0.25), "recent": np.int64(4), "residual_length": np.int32(32)}
    given = CacheConfig(scorer="cumulative", **values)
    assert given == CacheConfig(scorer="cumulative", heavy=0.25, recent=4, residual_length=32)
    json.dumps(dataclasses.asdict(given))


@pytest.mark.parametrize("bits", [True, 2.0])
def test_bits_are_integers(bits: object):
    with pytest.raises(ValueError, match=f"k_bits={bits}: expected one of"):
        CacheConfig(k_bits=bits, v_bits=bits)  # pyright: ignore[reportArgumentType]
