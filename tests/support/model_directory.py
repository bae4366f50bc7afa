"""Writes a tiny random chat model with a byte tokenizer as a Hugging Face directory."""

import json
import pathlib

from support.checkpoints import hf_config, random_tensors, write_hf
from support.tiny import tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per byte, and tokens for the roles and the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True) for text in (END, "<|user|>", "<|assistant|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=chat_template)


def write_model(directory: pathlib.Path) -> None:
    tokenizer = byte_tokenizer()
    config = tiny_config(
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_ids=(tokenizer.convert_tokens_to_ids(END),),
    )
    write_hf(directory, config, random_tensors(config))
    tokenizer.save_pretrained(directory)


def write_shape(path: pathlib.Path) -> str:
    """Writes a tiny model's config.json, and returns its path."""
    config = hf_config(tiny_config(head_dim=32))
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "eos_token_id"}))
    return str(path)
