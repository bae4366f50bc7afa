"""Uses a compressed cache in your own Flax model, a small Linen decoder with its own attention.

The attention calls three functions. Each takes a cache or returns one:
- `prefill_layer` for the prompt: computes causal attention, and compresses the keys and values;
- `append`, then `decode_attention`, for each new token.
"""

import argparse
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

import minikv_jax


class Attention(nn.Module):
    """Grouped-query attention over a prompt or, given a cache, for the next token of each row."""

    method: minikv_jax.Method
    layer: int
    num_layers: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    max_new_tokens: int = 64

    @nn.compact
    def __call__(self, x, lengths, cache=None):
        """Maps x [B, T, D] and lengths [B] to the layer's output [B, T, D] and its new cache."""
        q = nn.DenseGeneral((self.heads, self.head_dim), name="q")(x)
        k = nn.DenseGeneral((self.kv_heads, self.head_dim), name="k")(x)
        v = nn.DenseGeneral((self.kv_heads, self.head_dim), name="v")(x)
        if cache is None:
            inputs = minikv_jax.LayerInputs(q, k, v, lengths, layer=self.layer)
            out, cache = minikv_jax.prefill_layer(inputs, self.method, self.max_new_tokens, num_layers=self.num_layers)
        else:
            cache = minikv_jax.append(cache, k, v, jnp.ones_like(lengths), lengths[:, None])
            out = minikv_jax.decode_attention(q[:, 0], cache)[:, None]
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(out), cache


class Decoder(nn.Module):
    """Decoder with learned positions and two layers."""

    method: minikv_jax.Method
    vocabulary: int = 256
    width: int = 64
    num_layers: int = 2
    positions: int = 1024

    @nn.compact
    def __call__(self, ids, lengths, caches=None):
        """Maps ids [B, T] to logits [B, T, V] and new caches; `lengths` [B] counts prompt or cached tokens."""
        first = jnp.zeros_like(lengths) if caches is None else lengths
        positions = first[:, None] + jnp.arange(ids.shape[1])
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        x = embed(ids) + nn.Embed(self.positions, self.width, name="positions")(positions)
        new = []
        for layer in range(self.num_layers):
            attend = Attention(self.method, layer, self.num_layers, name=f"attention_{layer}")
            out, cache = attend(nn.LayerNorm()(x), lengths, None if caches is None else caches[layer])
            x = x + out
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
            new.append(cache)
        return embed.attend(nn.LayerNorm()(x)), tuple(new)


def generate(model: Decoder, params, ids, lengths, steps: int):
    """Generates greedy tokens [B, steps] in one compiled program, and returns them with the caches."""

    def step(state, _):
        token, lengths, caches = state
        logits, caches = model.apply(params, token[:, None], lengths, caches)
        return (jnp.argmax(logits[:, -1], axis=-1), lengths + 1, caches), token

    @jax.jit
    def run(params, ids, lengths):
        logits, caches = model.apply(params, ids, lengths)
        last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
        (_, _, caches), tokens = jax.lax.scan(step, (jnp.argmax(last, axis=-1), lengths, caches), length=steps)
        return tokens.T, caches

    return run(params, ids, lengths)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="minikv", choices=minikv_jax.lookup.names())
    parser.add_argument("--max-new-tokens", type=int, default=48, choices=range(1, 65), metavar="1..64")
    arguments = parser.parse_args()
    lengths = jnp.array([512, 300])
    ids = jax.random.randint(jax.random.key(0), (2, 512), 0, 256)
    full = Decoder(minikv_jax.lookup.get("full"))
    params = full.init(jax.random.key(1), ids[:, :8], jnp.array([8, 8]))
    model = dataclasses.replace(full, method=minikv_jax.lookup.get(arguments.method))
    sizes = []
    for name, decoder in (("full", full), (arguments.method, model)):
        tokens, caches = generate(decoder, params, ids, lengths, arguments.max_new_tokens)
        sizes.append(sum(cache.nbytes for cache in caches))
        print(f"{name}: {sizes[-1]:,} bytes of cache, first row: {tokens[0, :8].tolist()} ...")
    print(f"{1 - sizes[1] / sizes[0]:.0%} of the cache saved")


if __name__ == "__main__":
    main()
