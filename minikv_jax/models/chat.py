"""Encodes chat turns as token ids: the first turn of a conversation, and what each later turn adds."""

from __future__ import annotations

import contextlib
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minikv_jax import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLY = "<<the assistant's reply>>"
_MOST_SECONDS = 2.0  # a template normally takes milliseconds


def first_turn(tokenizer: PreTrainedTokenizerBase, message: str, reply: str = "") -> list[int]:
    """Encodes the first user message of a conversation, ready for the model's reply.

    Args:
      tokenizer: a tokenizer with a chat template.
      message: the user's message.
      reply: the beginning of the reply, which the model continues.

    Returns:
      Token ids.

    Raises:
      ValueError: the tokenizer has no chat template, or the template fails.
    """
    return _encode(tokenizer, render(tokenizer, [{"role": "user", "content": message}]) + reply)


def next_turn(tokenizer: PreTrainedTokenizerBase, message: str, last_token: int) -> list[int]:
    """Encodes what follows a reply: its end, the next user message, and the opening of the next reply.

    Args:
      tokenizer: a tokenizer with a chat template.
      message: the user's next message.
      last_token: the newest token in the cache. If it is the end of the reply, that token is not repeated.

    Returns:
      Token ids.

    Raises:
      ValueError: the tokenizer has no chat template, or the template fails or drops earlier replies.
    """
    turns = [("user", "?"), ("assistant", _REPLY), ("user", message)]
    text = render(tokenizer, [{"role": role, "content": content} for role, content in turns])
    _, reply, rest = text.partition(_REPLY)
    if not reply:
        raise _failure(tokenizer, "it drops earlier replies, and cannot continue a conversation")
    ids = _encode(tokenizer, rest)
    if not ids:
        raise _failure(tokenizer, "it writes nothing for a further message")
    return ids[1:] if ids[:1] == [last_token] else ids


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, open_last: bool = False
) -> str:
    """Renders a conversation with the tokenizer's chat template.

    A template is a program that comes with the model. transformers runs it in jinja2's sandbox. Any exception there, or
    an endless loop, becomes one ValueError here.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: turns, each with a `role` and a `content`.
      open_last: leave the last turn open, for the model to go on with, instead of opening a reply.

    Returns:
      The text, with the template's special tokens.

    Raises:
      ValueError: the tokenizer has no chat template, or the template fails.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: pass plain text")
    try:
        with _deadline():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=not open_last,
                continue_final_message=open_last,
                tokenize=False,
            )
    except Exception as error:
        raise _failure(tokenizer, f"{type(error).__name__}: {checks.reason(error)}") from error
    if not isinstance(text, str) or not text.strip():
        raise _failure(tokenizer, f"it gives {checks.shown(text)}; accepted: text")
    return text


def _failure(tokenizer: PreTrainedTokenizerBase, reason: str) -> ValueError:
    return ValueError(
        f"the chat template of {checks.printable(tokenizer.name_or_path) or 'the tokenizer'} fails: {reason}"
    )


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Raises TimeoutError in this thread if a template runs for too long."""
    end, before = time.monotonic() + _MOST_SECONDS, sys.gettrace()

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":  # jinja2's name for a compiled template
            return None
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {_MOST_SECONDS:g} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))  # the template writes the special tokens
    except (TypeError, UnicodeError) as error:  # lone surrogates
        raise _failure(tokenizer, f"its text cannot be encoded: {checks.reason(error)}") from error
