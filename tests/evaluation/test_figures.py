"""Tests the pictures of sweeps."""

from minikv_jax.evaluation import figures

PNG = b"\x89PNG\r\n\x1a\n"


def test_methods_beyond_the_colours_are_grey():
    """Methods on the frontier, then those given first, keep a colour and a name in the legend."""
    names = [f"m{i}" for i in range(12)]
    styles = figures.styles(names, {"m11", "m9"})
    named = [name for name in names if styles[name].get("label") == name]
    assert named == ["m0", "m1", "m2", "m3", "m4", "m9", "m11"]
    assert len({(styles[name]["color"], styles[name]["marker"]) for name in named}) == len(named)
    assert {styles[name]["color"] for name in names if name not in named} == {"0.6"}
    assert all("label" in style for style in figures.styles(names[:8], set()).values())
    mean = {"kl_to_full": 0.1, "cache_bytes": 1, "full_cache_bytes": 2}
    points = {name: {"method": name, "means": mean | {"cache_bytes": 1 + i}} for i, name in enumerate(names)}
    assert figures.pareto(points, "x").startswith(PNG)
