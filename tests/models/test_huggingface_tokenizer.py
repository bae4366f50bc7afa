"""Tests tokenizer files: accepted contents, and one-line errors."""

import json
import pathlib
from typing import Any

import pytest
from support.model_directory import byte_tokenizer

from minikv_jax.models.huggingface_tokenizer import tokenizer_from_hf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": 5}, "tokenizer_class is 5; accepted: text"),
        ({"chat_template": 5}, "chat_template is 5; accepted: text or a list or an object"),
        ({"chat_template": [{"name": "x"}]}, r"lacks chat_template\[0\]\.template"),
        ({"model_max_length": "long"}, "model_max_length is 'long'; accepted: a number"),
        ({"padding_side": "middle"}, "padding_side is 'middle'; accepted: 'left' or 'right'"),
        ({"eos_token": 7}, "eos_token is 7; accepted: text or an object"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; accepted: true or false"),
        ({"added_tokens_decoder": {"1": "x"}}, r"added_tokens_decoder\.1 is 'x'; accepted: an object"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: pathlib.Path, changes: dict[str, Any], message: str):
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json:? {message}$"):
        tokenizer_from_hf(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"version": "1.0", "model": {"type": "\x1b[2J"}}', ""])
def test_an_unreadable_tokenizer_is_one_line(tmp_path: pathlib.Path, text: str):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="holds a tokenizer that transformers cannot read: ") as error:
        tokenizer_from_hf(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_directory_without_a_vocabulary_has_no_tokenizer(tmp_path: pathlib.Path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert tokenizer_from_hf(tmp_path) is None
