"""Tests fields that describe their accepted values."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minikv_jax import fields
from minikv_jax.fields import setting


@dataclasses.dataclass(frozen=True)
class Settings:
    lag: int = setting(kind=int, at_least=1, at_most=8)
    norm: float = setting(default=0.5, above=0, at_most=1)
    rate: float = setting(default=0.0, at_least=0)
    rule: str = setting(default="max", choices=("max", "mean"))
    often: int | None = setting(default=None, kind=int, at_least=1)
    flag: bool = False
    plain: float = 1.0
    anything: Any = ()

    def __post_init__(self) -> None:
        fields.check(self)


WITH_LAG: dict[str, Any] = {"lag": 1}


def test_values_become_pythons_own():
    given: dict[str, Any] = {"lag": np.int64(3), "norm": 1, "plain": np.float32(2), "often": None, "flag": np.True_}
    made = Settings(**given, anything=[1])
    assert made == Settings(3, 1.0, plain=2.0, flag=True, anything=[1])
    assert [type(value) for value in (made.lag, made.norm, made.plain, made.flag)] == [int, float, float, bool]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lag": 0}, "lag=0: expected an integer in 1..8"),
        ({"lag": 9}, "lag=9: expected an integer in 1..8"),
        ({"lag": True}, "lag=True: expected an integer in 1..8"),
        ({"lag": 2.0}, "lag=2.0: expected an integer in 1..8"),
        ({"norm": 0.0}, "norm=0.0: expected a finite number above 0 and at most 1"),
        ({"norm": float("nan")}, "norm=nan: expected a finite number"),
        ({"rate": float("inf")}, "rate=inf: expected a finite number at least 0"),
        ({"rate": 10**400}, "rate=10+[.]{3}0+: expected a finite number at least 0"),
        ({"rate": "1"}, "rate='1': expected a finite number"),
        ({"rule": "sum"}, "rule='sum': expected one of max, mean"),
        ({"rule": None}, "rule=None: expected one of max, mean"),
        ({"often": 0}, "often=0: expected an integer at least 1 or none"),
        ({"flag": 1}, "flag=1: expected true or false"),
        ({"plain": np.float64("nan")}, r"plain=np.float64\(nan\): expected a finite number"),
    ],
)
def test_what_is_not_accepted_is_named_with_what_is(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(**WITH_LAG | values)
