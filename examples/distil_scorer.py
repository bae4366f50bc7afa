"""Distils a scorer: learns from a text which tokens the model attends to later, and evicts the others.

The teacher is the attention that a token of the first half of a passage gets from the queries of the second half. The
student is linear in the token's key, value and their norms, with weights for each layer and KV head. It reads no
queries, so it costs almost nothing at prefill, as KNorm does. Try it:

    python examples/distil_scorer.py --model smollm2-135m-instruct --text examples/log.txt
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import minikv_jax

SHARE = 0.25  # of the tokens are kept


def features(k: jax.Array, v: jax.Array) -> jax.Array:
    """What the student sees of each token: [B, T, K, H] twice -> [B, T, K, 2 H + 2]."""
    k, v = (x.astype(jnp.float32) / x.shape[-1] ** 0.5 for x in (k, v))
    norms = [jnp.log(jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) for x in (k, v)]
    return jnp.concatenate([k, v, *norms], axis=-1)


def later_attention(q: jax.Array, k: jax.Array) -> jax.Array:
    """The teacher: attention of the second half's queries to each key of the first half, [B, K, T / 2]."""
    batch, tokens, heads, dim = q.shape
    q = q[:, tokens // 2 :].reshape(batch, -1, k.shape[2], heads // k.shape[2], dim)
    logits = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    seen = jnp.arange(tokens) <= tokens // 2 + jnp.arange(tokens - tokens // 2)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.mean(weights, axis=(2, 3))[..., : tokens // 2]


@jax.jit
def collect(model: minikv_jax.Llama, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs passages [B, T]. Returns features [B, L, T / 2, K, F] and the teacher's attention [B, L, K, T / 2]."""
    seen = []

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        del layer
        seen.append((features(k, v)[:, : ids.shape[1] // 2], later_attention(q, k)))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    model.forward(ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), attend)
    inputs, targets = zip(*seen, strict=True)
    return jnp.stack(inputs, axis=1), jnp.stack(targets, axis=1)


def scores(weights: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.einsum("blskf,lkf->blks", inputs, weights)


def loss(weights: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of the student's softmax over the tokens, for each layer, head and passage."""
    shares = targets / jnp.sum(targets, axis=-1, keepdims=True)
    return -jnp.mean(jnp.sum(shares * jax.nn.log_softmax(scores(weights, inputs)), axis=-1))


def distil(inputs: jax.Array, targets: jax.Array, *, steps: int, rate: float = 0.02) -> jax.Array:
    """Learns the student's weights [L, K, F]."""
    weights, adam = (
        jnp.zeros((inputs.shape[1], *inputs.shape[3:])),
        optax.adam(optax.cosine_decay_schedule(rate, steps)),
    )

    def step(carry, _):
        weights, state = carry
        change, state = adam.update(jax.grad(loss)(weights, inputs, targets), state)
        return (optax.apply_updates(weights, change), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0][0])((weights, adam.init(weights)))


def kept(scores: jax.Array, targets: jax.Array) -> float:
    """Share of the teacher's attention that falls on the top-scored tokens."""
    _, best = jax.lax.top_k(scores, int(SHARE * scores.shape[-1]))
    found = jnp.sum(jnp.take_along_axis(targets, best, axis=-1), axis=-1) / jnp.sum(targets, axis=-1)
    return float(jnp.mean(found))


def method(weights: jax.Array) -> minikv_jax.Method:
    """A method with the student as its scorer."""

    def score(inputs: minikv_jax.LayerInputs) -> jax.Array:
        return jnp.einsum("bskf,kf->bks", features(inputs.k, inputs.v), weights[inputs.layer])

    return minikv_jax.Method(scorer=score, heavy=SHARE, recent=0.1, sinks=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a directory, a .gguf file or a hub id")
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path(__file__).with_name("log.txt"))
    parser.add_argument("--tokens", type=int, default=128, help="length of a passage")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    model, tokenizer = minikv_jax.load(arguments.model)
    assert tokenizer is not None, "this example needs a model with a tokenizer"
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    passages = np.array(ids[: len(ids) // arguments.tokens * arguments.tokens], np.int32).reshape(-1, arguments.tokens)
    inputs, targets = (
        jnp.concatenate(parts) for parts in zip(*(collect(model, p[None]) for p in passages), strict=True)
    )
    test = max(1, len(passages) // 4)
    weights = distil(inputs[:-test], targets[:-test], steps=arguments.steps)
    short_keys = -jnp.swapaxes(inputs[-test:, ..., -2], 2, 3)
    for name, found in (
        ("student", scores(weights, inputs[-test:])),
        ("KNorm", short_keys),
        ("teacher", targets[-test:]),
    ):
        print(f"{name}: {kept(found, targets[-test:]):.1%} of later attention on {SHARE:.0%} of the tokens")
    prompt = [passages[-1].tolist()]
    result = minikv_jax.generate(model, prompt, method=method(weights), max_new_tokens=arguments.max_new_tokens)
    print(tokenizer.decode(result.tokens[0, : int(result.lengths[0])].tolist()))


if __name__ == "__main__":
    main()
