"""Tests `minikv methods`."""

import pathlib

from support.commands import Run

from minikv_jax.methods import lookup


def test_methods_lists_every_method_and_setting(run: Run):
    code, text, _ = run("methods")
    assert code == 0
    for name in lookup.names():
        assert f"{name}\n    {lookup.get(name).citation}\n" in text
    for setting in ("heavy=0.0", "evict_every=none", "tail.length=128"):  # defaults, as --set takes them
        assert f"    {setting}\n" in text
    for component in ("pyramid beta=7.0", "lagkv lag=128", "hadamard k_bits=2 v_bits=2 group_size=16"):
        assert f"    {component}" in text
    assert "scorer=h2o budget=pyramid budget.beta=7.0 quantizer=minmax quantizer.k_bits=2" in text  # minikv-pyramid


def test_methods_of_a_plugin_are_listed(run: Run, tmp_path: pathlib.Path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import minikv_jax\nminikv_jax.register_method(minikv_jax.Method(name='mine', citation='I, 2026'))\n"
    )
    code, text, _ = run("methods", "--plugin", plugin)
    assert code == 0
    assert "mine\n    I, 2026\n" in text
