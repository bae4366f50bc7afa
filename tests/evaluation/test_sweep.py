"""Tests the grid of a sweep."""

from minikv_jax.evaluation.sweep import grid
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Share


def test_the_grid_is_every_combination():
    points = grid(["h2o", "minikv:k_bits=4"], {"heavy": ["0.1", "0.2"], "sinks": ["4"]}, (0.125,))
    assert [point.label for point in points] == [
        "h2o:heavy=0.1,sinks=4 @ 0.125",
        "h2o:heavy=0.2,sinks=4 @ 0.125",
        "minikv:k_bits=4,heavy=0.1,sinks=4 @ 0.125",
        "minikv:k_bits=4,heavy=0.2,sinks=4 @ 0.125",
    ]
    method = points[-1].resolve([("heavy", "0.5"), ("v_bits", "4")]).method
    assert method.quantizer == MinMax(k_bits=4, v_bits=4, group_size=16)
    assert (method.heavy, method.sinks) == (Share(0.2), 4)
    assert [point.label for point in grid(["full"], {})] == ["full"]
    shared = grid(["h2o", "kivi-2", "nosuch"], {}, (0.25, 0.5))  # a method that keeps every token has no budget to fit
    assert [point.label for point in shared] == ["h2o @ 0.25", "h2o @ 0.5", "kivi-2", "nosuch @ 0.25", "nosuch @ 0.5"]
    assert [point.label for point in grid(["kivi-2"], {}, (0.25,), [("recent", "0.5")])] == ["kivi-2 @ 0.25"]
