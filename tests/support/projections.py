"""A model with random queries, keys and values per token, whose output is every layer's attention."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from support.layers import normal

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.windows import Window

VOCABULARY, H = 400, 32


@dataclasses.dataclass(frozen=True)
class Projections:
    """Replaces a Llama: looks up a token's queries, keys and values, and returns every layer's output."""

    config: ModelConfig
    q: np.ndarray  # [L, V, N, H]
    k: np.ndarray  # [L, V, K, H]
    v: np.ndarray
    o: np.ndarray  # [L, N * H, D]
    dtype: str = "float32"
    mesh: None = None

    def window(self, layer: int) -> Window | None:
        return self.config.window(layer)

    def softmax_options(self, layer: int) -> dict[str, None]:
        return {"soft_cap": None, "sink_logits": None}

    def output_projection(self, layer: int) -> np.ndarray:
        return self.o[layer]

    def forward(
        self, ids: jax.Array, positions: jax.Array, attend: Callable[..., jax.Array], *reduce: object
    ) -> jax.Array:
        outs = [
            attend(layer, *(jnp.asarray(table[layer])[ids] for table in (self.q, self.k, self.v)))
            for layer in range(self.config.num_hidden_layers)
        ]
        return jnp.stack(outs, axis=2)  # [B, T, L, N, H]


def projections(layers: int, heads: tuple[int, int]) -> Projections:
    """Makes random projections; deeper layers have sharper attention."""
    N, K = heads
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=N * H,
        intermediate_size=H,
        num_hidden_layers=layers,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        max_position_embeddings=1024,
    )
    rng = np.random.default_rng(0)
    sharpness = np.linspace(0.5, 2.0, layers, dtype=np.float32)[:, None, None, None]
    q, k, v = (normal(rng, layers, VOCABULARY, count, H) for count in (N, K, K))
    return Projections(config, q * sharpness, k, v, normal(rng, layers, N * H, config.hidden_size))
