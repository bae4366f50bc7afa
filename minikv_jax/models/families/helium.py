"""Helium 1 (Kyutai): Llama that rotates neighbouring channels."""

from minikv_jax.models import bounds, family


class Fields(family.Fields):
    """Fields of a config.json in addition to those of all families."""

    num_key_value_heads: bounds.Heads | None = 20
    head_dim: bounds.Width | None = 128
    max_position_embeddings: bounds.Positions = 4096
    rms_norm_eps: bounds.Epsilon = 1e-8
    attention_bias: bounds.Off = False
    mlp_bias: bool | None = False


FAMILY = family.Family(model_type="helium", fields=Fields, rope_theta=100000.0, rope_interleaved=True)
