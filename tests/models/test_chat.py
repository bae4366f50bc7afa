"""Chat templates as token ids, turn by turn."""

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
