"""Holds a conversation: each turn is appended to the compressed cache of the earlier ones, so nothing runs twice."""

import argparse

import minikv_jax
from minikv_jax.models import chat

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m-instruct", help="a directory, a .gguf file or a hub id")
parser.add_argument("--max-new-tokens", type=int, default=64)
arguments = parser.parse_args()

model, tokenizer = minikv_jax.load(arguments.model)
assert tokenizer is not None, "this example needs a model with a tokenizer"
cache, last_token = None, -1
for message in ("Name a city by the sea.", "What can I see there?"):
    if cache is None:
        turn = chat.first_turn(tokenizer, message)
        result = minikv_jax.generate(model, [turn], method="minikv", max_new_tokens=arguments.max_new_tokens)
    else:
        turn = chat.next_turn(tokenizer, message, last_token)
        result = minikv_jax.generate(model, [turn], cache=cache, max_new_tokens=arguments.max_new_tokens)
    tokens = result.tokens[0, : int(result.lengths[0])].tolist()
    cache, last_token = result.cache, tokens[-1]
    print(f"> {message}\n{tokenizer.decode(tokens, skip_special_tokens=True)}")
    print(f"[{cache.length[0]} tokens seen, {cache.nbytes:,} bytes of cache]")
