"""Twin windows: selection by two votes, 4 bits with 8-bit metadata, a short tail (minikv_jax; docs/results.md)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from minikv_jax.fields import setting
from minikv_jax.methods.base import MAX_WINDOW, LayerInputs
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.methods.registry import register_method, register_scorer
from minikv_jax.methods.snapkv import SnapKV
from minikv_jax.methods.votes import pool, ranks


@register_scorer("twin")
class Twin(SnapKV):
    """Keeps the first choices of two votes (minikv_jax; docs/results.md).

    A token's score is the better of its ranks in the two votes, negated. One vote is that of SnapKV, of the last
    `observation_window` queries, with all tokens pooled. It finds whole passages that the end of the prompt, often a
    question, asks for. The other is of the last `long_window` queries, not pooled. It finds single tokens that the text
    keeps coming back to, which a few queries do not show. Ranks, unlike a sum, do not let one vote drown out the other.

    Attributes:
      long_window: number of last queries in the second vote.
    """

    long_window: int = setting(default=256, at_least=1, at_most=MAX_WINDOW)

    @property
    def vote_windows(self) -> tuple[int, ...]:
        return (self.observation_window, self.long_window)

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        short, long = inputs.votes
        short = pool(short, inputs.lengths, self.pooling, self.pooling_kernel)
        return -jnp.minimum(*ranks(short, long)).astype(jnp.float32)


# Evicting half costs little quality and two bits cost much; 8-bit metadata and a short tail free bytes:
# docs/results.md.
TWIN_4BIT = register_method(
    Method(
        name="twin-4bit",
        citation="minikv_jax: 44 % by the votes of a short and a long window + the newest 256, 4 bits, 8-bit metadata; "
        "no more bytes than minikv",
        scorer=Twin(observation_window=16, pooling_kernel=31),
        heavy=0.44,
        recent=256,
        sinks=4,
        quantizer=MinMax(k_bits=4, v_bits=4, group_size=32, metadata_dtype="float8_e4m3fn"),
        tail=Tail(length=32),
    )
)
register_method(
    dataclasses.replace(
        TWIN_4BIT,
        name="twin-4bit-half",
        citation="minikv_jax: as twin-4bit, 21 % + the newest 32; half of minikv's bytes",
        heavy=0.21,
        recent=32,
    )
)
