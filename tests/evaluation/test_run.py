"""Tests the means of rows."""

from minikv_jax.evaluation.run import means


def test_rows_that_are_not_finite_are_counted_and_never_averaged():
    rows = [
        {"finite": True, "nll": 1.0, "score": 0.5},
        {"finite": False, "nll": None, "score": None},
        {"finite": True, "nll": 2.0, "score": None},
    ]
    averaged = means(rows)
    assert (averaged["cases"], averaged["not_finite"], averaged["nll"], averaged["score"]) == (3, 1, 1.5, 0.5)
    assert "kl_to_full" not in averaged
    assert "nll" not in means(rows[1:2])
