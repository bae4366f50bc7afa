"""Tiny random models for the tests."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama


def tiny_config(**changes: Any) -> ModelConfig:
    """Makes a config with two layers, grouped queries, and a head size other than hidden_size / heads."""
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**fields | changes)


def tiny_model(seed: int = 0, dtype: str = "float32", **changes: Any) -> Llama:
    return Llama(tiny_config(**changes), dtype=dtype, rngs=nnx.Rngs(seed))


def random_ids(shape: tuple[int, int], vocab_size: int = 96, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, dtype=jnp.int32)
