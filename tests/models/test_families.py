"""Tests the registry of model families."""

import pathlib
import sys

import pytest
from support.checkpoints import hf_config
from support.tiny import tiny_config

from minikv_jax.models import families
from minikv_jax.models.huggingface import config_from_hf

FILES = sorted(path.stem for path in pathlib.Path(families.__file__).parent.glob("*.py") if path.stem != "__init__")


def test_every_file_is_a_family():
    assert sorted(families.FAMILIES) == FILES
    with pytest.raises(ValueError, match=f"model_type='gpt2': expected one of {', '.join(FILES)}"):
        families.get("gpt2")


def test_a_new_family_is_a_new_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "newcomer.py").write_text(
        "from minikv_jax.models.design import Design\nfrom minikv_jax.models.family import Family, Fields\n"
        "class Fields(Fields):\n"
        "    head_dim: int = 8\n"
        "    mlp_bias: bool = False\n"
        "    span: int\n"
        "FAMILY = Family(\n"
        "    model_type='new-comer', fields=Fields, design=Design(qk_norm='head'),\n"
        "    windows=lambda fields: (fields.span, None)\n"
        ")\n"
    )
    fields = hf_config(tiny_config(), model_type="new-comer", span=7, mlp_bias=True)
    del fields["head_dim"], fields["sliding_window"]
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(families, "FAMILIES", families.discover())
    monkeypatch.delitem(sys.modules, f"{families.__name__}.newcomer")
    config = config_from_hf(fields)
    assert (config.model_type, config.head_dim, config.window(1)) == ("new-comer", 8, 7)
    assert config.design.qk_norm == "head"
    assert config.mlp_bias
    assert not config.attention_bias  # a switch that the family does not read
    with pytest.raises(ValueError, match="the config: span is '7'; accepted: an integer"):
        config_from_hf(fields | {"span": "7"})
