"""Tests chat templates as token ids, turn by turn."""

import sys
import time

import pytest
from support.model_directory import END, byte_tokenizer

from minikv_jax.models import chat


def test_next_turn_does_not_repeat_the_end_token():
    tokenizer = byte_tokenizer()
    (end,) = tokenizer.encode(END)
    text = "\n<|user|>next<|end|>\n<|assistant|>"
    assert tokenizer.decode(chat.next_turn(tokenizer, "next", end)) == text
    assert tokenizer.decode(chat.next_turn(tokenizer, "next", 0)) == END + text


def test_conversation_in_turns_is_the_template_of_the_whole():
    tokenizer = byte_tokenizer()
    (end,) = tokenizer.encode(END)
    reply = [*tokenizer.encode("four"), end]
    turns = chat.first_turn(tokenizer, "2 + 2?") + reply + chat.next_turn(tokenizer, "sure?", end)
    messages = [("user", "2 + 2?"), ("assistant", "four"), ("user", "sure?")]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(turns) == whole


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nobody.name }}", "UndefinedError: 'nobody' is undefined"),
        ("{{ messages[7]['role'] }}", "UndefinedError: list object has no element 7"),
        ("{{ messages | nosuch }}", "TemplateAssertionError: No filter named 'nosuch'"),
        ("{{ raise_exception('\x1b[2J no system\nrole') }}", r"TemplateError: \x1b[2J no system role"),
        ("{% for", "TemplateSyntaxError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
        ("{{ '('*5000 ~ ')'*5000 }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError: "),
        ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
        (ENDLESS, "TimeoutError: it takes more than 0.2 s"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{{ 'a' * 10**15 }}", "MemoryError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
        ("{% include 'file' %}", "TypeError: no loader"),
        ("{{ '%d' % 'x' }}", "TypeError: "),
        ("", "it gives ''; accepted: text"),
        (" \n ", "accepted: text"),
        ("\ud800", "its text cannot be encoded: "),
    ],
    ids=str,
)
def test_a_template_that_fails_is_named_in_one_line(template: str, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.2)
    tokenizer, before = byte_tokenizer(template), sys.gettrace()
    tokenizer.name_or_path = "some/model"
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"^the chat template of some/model fails: ") as error:
        chat.first_turn(tokenizer, "hello")
    assert reason in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500
    assert time.perf_counter() - begin < 5
    assert sys.gettrace() is before


def test_a_template_that_drops_replies_cannot_go_on():
    tokenizer = byte_tokenizer("{{ messages[-1]['content'] }}")
    assert chat.first_turn(tokenizer, "a") == tokenizer.encode("a")
    with pytest.raises(ValueError, match="the chat template of the tokenizer fails: it drops earlier replies"):
        chat.next_turn(tokenizer, "b", 0)
    ends_there = byte_tokenizer("{% for message in messages[:2] %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="it writes nothing for a further message"):
        chat.next_turn(ends_there, "b", 0)
