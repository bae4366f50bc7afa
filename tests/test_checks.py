"""Tests numbers read from text."""

import pytest

from minikv_jax.checks import read_integer, read_number, shown


def test_ascii_numbers_are_read():
    assert [read_integer(text) for text in ("0", "-12", "+7", "007")] == [0, -12, 7, 7]
    assert [read_number(text) for text in ("0", "-1.5", "+.5", "2.", "1e-3", "1E3")] == [0, -1.5, 0.5, 2, 0.001, 1000]


@pytest.mark.parametrize("text", ["", "1.0", "1_000", " 1", "1\n", "٤", "²", "0x10", "1e3", "--1", "1" * 31, "true"])
def test_what_is_no_integer_is_refused(text: str):
    with pytest.raises(ValueError, match=r": expected an integer$"):
        read_integer(text)


@pytest.mark.parametrize("text", ["", ".", "nan", "inf", "-Infinity", "1e999", "1_0.5", "٠.٢", "0.5 ", "0x1p3", "1e"])
def test_what_is_no_finite_number_is_refused(text: str):
    with pytest.raises(ValueError, match=r": expected a finite number$"):
        read_number(text)


def test_what_is_shown_fits_a_line():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10000)) < 100
