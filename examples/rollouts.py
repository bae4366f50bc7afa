"""Trains a small model with rollouts from a compressed cache: `python examples/rollouts.py --method minikv`.

The toy reward is the share of even token ids in what the model writes. REINFORCE updates the weights. The sampler reads
a compressed cache and the gradient a whole one, so their policies differ: each token's loss is weighted by the ratio of
its probabilities, truncated at 2.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import minikv_jax


def tiny_model(seed: int = 0) -> minikv_jax.Llama:
    """Makes a random model; `minikv_jax.load` gives a real one."""
    config = minikv_jax.ModelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    return minikv_jax.Llama(config, rngs=nnx.Rngs(seed))


def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention that JAX can differentiate, unlike the library's own, which is for inference."""
    del layer
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def loss(model: minikv_jax.Llama, ids: jax.Array, sampled: jax.Array, advantages: jax.Array) -> jax.Array:
    """Policy gradient of the last tokens of `ids` [B, T], drawn with the log-probabilities `sampled` [B, M]."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    logits = model.logits(model.forward(ids, positions, attend))
    logp = jax.nn.log_softmax(logits[:, :-1])
    new = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[:, -sampled.shape[1] :, 0]
    ratio = jnp.minimum(jnp.exp(jax.lax.stop_gradient(new) - sampled), 2.0)
    return -jnp.mean(ratio * advantages[:, None] * new)


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def update(model: minikv_jax.Llama, optimizer: nnx.Optimizer, ids, sampled, advantages) -> None:
    optimizer.update(model, nnx.grad(loss)(model, ids, sampled, advantages))


def train(model: minikv_jax.Llama, method: str, *, steps: int, rows: int = 32, prompt: int = 96, new: int = 16):
    """Yields the mean reward of each step's rollouts."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    sampling = minikv_jax.Sampling(temperature=1.0)
    for step in range(steps):
        draw, key = jax.random.split(jax.random.key(step))
        prompts = jax.random.randint(draw, (rows, prompt), 0, model.config.vocab_size)
        rollout = minikv_jax.generate(
            model,
            prompts,
            method=method,
            max_new_tokens=new,
            sampling=sampling,
            key=key,
            eos_token_ids=(),
            log_probabilities=True,
        )
        rewards = jnp.mean(rollout.tokens % 2 == 0, axis=1)
        ids = jnp.concatenate([prompts, rollout.tokens], axis=1)
        update(model, optimizer, ids, rollout.log_probabilities, rewards - jnp.mean(rewards))
        yield float(jnp.mean(rewards))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="minikv", choices=minikv_jax.lookup.names())
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    for step, reward in enumerate(train(tiny_model(), arguments.method, steps=arguments.steps)):
        if step % 5 == 0 or step == arguments.steps - 1:
            print(f"step {step}: reward {reward:.3f}")


if __name__ == "__main__":
    main()
