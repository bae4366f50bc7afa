"""Generates text from Python in ten lines: `python examples/generate.py --model smollm2-135m-instruct`."""

import argparse

import minikv_jax

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m-instruct", help="a directory, a .gguf file or a hub id")
parser.add_argument("--method", default="minikv", choices=minikv_jax.lookup.names())
parser.add_argument("--max-new-tokens", type=int, default=64)
arguments = parser.parse_args()

model, tokenizer = minikv_jax.load(arguments.model)
assert tokenizer is not None, "this example needs a model with a tokenizer"
prompts = [tokenizer.encode(text) for text in ("The tide went out, and", "In the year of the great storm the keeper")]
result = minikv_jax.generate(model, prompts, method=arguments.method, max_new_tokens=arguments.max_new_tokens)
for tokens, length in zip(result.tokens, result.lengths, strict=True):
    print(tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True))
print(f"{result.cache.nbytes:,} bytes of cache, {result.cache.packed_bytes:,} of them packed")
