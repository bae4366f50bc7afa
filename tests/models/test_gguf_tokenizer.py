"""Tests tokenizers in GGUF files."""

import pathlib
from typing import Any

import gguf
import pytest
from support.checkpoints import random_tensors, write_gguf
from support.tiny import tiny_config

from minikv_jax.models import hub
from minikv_jax.models.decoder import Llama
from minikv_jax.models.gguf_file import GGUFFile
from minikv_jax.models.gguf_tokenizer import tokenizer_from_gguf


def byte_vocabulary(*more: str) -> list[str]:
    """Makes a vocabulary of GPT-2's printable characters for bytes, and merged words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)] + list(more)


def gguf_with_vocabulary(path: pathlib.Path, tokens: list[str], **metadata: Any) -> GGUFFile:
    config = tiny_config(vocab_size=len(tokens))
    values = {f"tokenizer.ggml.{key}": value for key, value in (metadata | {"tokens": tokens}).items()}
    write_gguf(path, config, random_tensors(config), metadata=values)
    return GGUFFile(path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "ab", "Ġ", "123", "4"]),
    ],
)
def test_byte_level_vocabularies(tmp_path: pathlib.Path, pre: str, pieces: list[str]):
    tokens = byte_vocabulary("ab", "123", "<s>", "<tool>")
    file = gguf_with_vocabulary(
        tmp_path / "m.gguf",
        tokens,
        model="gpt2",
        pre=pre,
        merges=["a b"],
        token_type=[1] * 258 + [3, 4],
        bos_token_id=258,
        eos_token_id=258,
    )
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab 1234")) == pieces
    text = "tabs\tand  spaces, naïve 漢字🙂 it's 42\n\n<tool>ab"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [259]
    assert tokenizer.eos_token_id == 258
    assert tokenizer.chat_template is None


def test_sentence_piece_vocabulary(tmp_path: pathlib.Path):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [-1.0, -2.0, -3.0, -4.0, -9.0, -5.0, -6.0, -7.0, -8.0]
    file = gguf_with_vocabulary(
        tmp_path / "m.gguf",
        ["<unk>", "<s>", "</s>", *bytes_, *pieces],
        model="llama",
        scores=[0.0] * 259 + scores,
        token_type=[2, 3, 3] + [6] * 256 + [1] * 9,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = tokenizer_from_gguf(file)
    # "bc" (-5) merges before "▁a" (-6) and "ab" (-9): the order of the scores, not of the text.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["<s>", "▁a", "bc"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é"))[1:] == ["▁", "<0xC3>", "<0xA9>"]
    text = "ab  abc é 🙂\n c"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; accepted: 'gpt2' or 'llama'"),
        (
            {"model": "gpt2", "pre": "tekken", "merges": ["a b"]},
            "pre is 'tekken'; accepted: llama-bpe",
        ),
        ({"model": "gpt2", "pre": "qwen2"}, "tokenizer.ggml: merges is missing, which model 'gpt2' needs"),
        ({"model": "gpt2", "merges": ["ab"]}, "m.gguf: no tokenizer can be made of its vocabulary: merge 'ab'"),
        ({"model": "gpt2", "merges": ["a bc"]}, "no tokenizer can be made of its vocabulary: .*out of vocabulary"),
        ({"model": "gpt2", "merges": "a b"}, "tokenizer.ggml.merges is 'a b'; accepted: a list"),
        ({"model": "gpt2", "merges": [1]}, r"tokenizer.ggml.merges\[0\] is 1; accepted: text"),
        ({"model": "gpt2", "merges": ["a b"], "bos_token_id": 257}, "bos_token_id is 257; accepted: 0 to 256"),
        ({"model": "gpt2", "merges": ["a b"], "eos_token_id": "2"}, "eos_token_id is '2'; accepted: an integer"),
        ({"model": "gpt2", "merges": ["a b"], "token_type": [1]}, "token_type has 1 entries; accepted: 257"),
        ({"model": "gpt2", "merges": ["a b"], "add_bos_token": 1}, "add_bos_token is 1; accepted: true or false"),
        ({"model": "llama", "scores": [float("nan")] * 257}, r"scores\[0\] is nan; accepted: a finite number"),
        ({"model": "llama"}, "tokenizer.ggml: scores is missing, which model 'llama' needs"),
    ],
)
def test_vocabularies_that_are_not_supported(tmp_path: pathlib.Path, metadata: dict[str, Any], message: str):
    file = gguf_with_vocabulary(tmp_path / "m.gguf", byte_vocabulary("ab"), **metadata)
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(file)


def test_a_token_that_appears_twice_is_named(tmp_path: pathlib.Path):
    file = gguf_with_vocabulary(tmp_path / "m.gguf", byte_vocabulary("\x1b", "\x1b"), model="gpt2", merges=["a b"])
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml: token '\\x1b' appears twice"):
        tokenizer_from_gguf(file)


def test_smollm2_tokenizer(smollm2: tuple[Llama, Any]):
    _, tokenizer = smollm2
    text = "The year 1984, it's  naïve:\n\n\tdef f(x): return '漢字🙂' <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1984")) == ["1", "9", "8", "4"]
    fields = gguf.GGUFReader(hub.demo_model_path()).fields
    assert len(tokenizer) == len(fields["tokenizer.ggml.tokens"].data)
