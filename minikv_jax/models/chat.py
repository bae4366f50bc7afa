"""Chat templates as token ids: the first turn of a conversation, and the tokens that each further turn adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLY = "<<the assistant's reply>>"


def first_turn(tokenizer: PreTrainedTokenizerBase, message: str, reply: str = "") -> list[int]:
    """Token ids of a conversation that opens with `message` and waits for the reply, or for the rest of `reply`.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    return _encode(tokenizer, _render(tokenizer, [{"role": "user", "content": message}]) + reply)


def next_turn(tokenizer: PreTrainedTokenizerBase, message: str, last_token: int) -> list[int]:
    """Token ids that follow a reply: its end, `message`, and the opening of the next reply.

    Args:
      tokenizer: with a chat template.
      message: the user's next message.
      last_token: the newest token in the cache; if the reply's end token was drawn already, it is not repeated.

    Raises:
      ValueError: the tokenizer has no chat template, or one that drops earlier replies.
    """
    turns = [("user", "?"), ("assistant", _REPLY), ("user", message)]
    text = _render(tokenizer, [{"role": role, "content": content} for role, content in turns])
    _, reply, rest = text.partition(_REPLY)
    if not reply:
        raise ValueError("the tokenizer's chat template drops earlier replies: it cannot continue a conversation")
    ids = _encode(tokenizer, rest)
    return ids[1:] if ids[0] == last_token else ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: pass plain text")
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template writes them
