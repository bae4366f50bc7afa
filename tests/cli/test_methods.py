"""`minikv methods`."""

import pathlib

from support.commands import Run

from minikv_jax.methods import lookup as presets


def test_methods_lists_every_preset_and_field(run: Run):
    code, text, _ = run("methods")
    assert code == 0
    for name in presets.names():
        assert f"{name}\n    {presets.get(name).citation}\n" in text
    assert "pyramid_beta=7.0" in text


def test_methods_of_a_plugin_are_listed(run: Run, tmp_path: pathlib.Path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import minikv_jax\nminikv_jax.register_method(minikv_jax.CacheConfig(name='mine', citation='I, 2026'))\n"
    )
    code, text, _ = run("methods", "--plugin", plugin)
    assert code == 0
    assert "mine\n    I, 2026\n" in text
