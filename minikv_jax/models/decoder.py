"""The decoder of all model families in Flax NNX: they differ only in their config (`config.py`, `design.py`).

The model has no cache and calls no attention op. Attention is a callback, so prefill, decode and one-shot runs share
the model's code. Shape letters are those of docs/architecture.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax import meshes
from minikv_jax.arrays import resolve_dtype
from minikv_jax.meshes import DATA, MODEL, constrain
from minikv_jax.models.attention import Attention
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.latent_attention import LatentAttention
from minikv_jax.models.mlp import MLP
from minikv_jax.models.moe import SparseMLP
from minikv_jax.models.norms import Norm
from minikv_jax.models.projections import Reduce, linear, precision, sum_over_devices
from minikv_jax.models.rotary import rotary_tables, tuned
from minikv_jax.models.windows import Window

# attend(layer, q[B, T, N, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, N, H]; q and k are normalised and rotated.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

# Tokens per chunk of the MLP and of a prefill: enough to keep a matmul busy, and few enough that the MLP's three arrays
# of `intermediate_size` take about as much memory as attention does.
CHUNK_TOKENS = 1 << 14


class Layer(nnx.Module):
    """One transformer layer: attention and MLP, each added to its input (`Design` says where the norms are)."""

    def __init__(self, config: ModelConfig, number: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        design, sparse = config.design, config.experts is not None and config.experts.in_layer(number)

        def norm(present: bool) -> Norm | None:
            return Norm(config, config.hidden_size, dtype=dtype) if present else None

        self.input_layernorm = norm(design.pre_norms)
        attention = Attention if config.latent is None else LatentAttention
        self.self_attn = attention(config, number, dtype=dtype, rngs=rngs)
        self.attention_output_norm = norm(design.post_norms)
        self.post_attention_layernorm = norm(design.pre_norms and not design.parallel)  # of the MLP's input
        self.mlp = (SparseMLP if sparse else MLP)(config, dtype=dtype, rngs=rngs)
        self.mlp_output_norm = norm(design.post_norms)
        self.parallel, self.multiplier = design.parallel, config.residual_multiplier

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        def mlp(x: jax.Array) -> jax.Array:
            return self._branch(self.mlp_output_norm, self.mlp(x, reduce))

        with jax.named_scope("attention"):
            normal = _through(self.input_layernorm, x)
            out = self._branch(self.attention_output_norm, self.self_attn(normal, cos, sin, attend, reduce))
            attended = _add(x, out)
        with jax.named_scope("mlp"):
            if self.parallel:
                return _add(attended, _by_chunks(mlp, normal))
            return _by_chunks(lambda x: _add(x, mlp(_through(self.post_attention_layernorm, x))), attended)

    @property
    def sink_logits(self) -> Float[Array, "N"] | None:
        """Logits of the attention sinks, which attention ops add to the softmax's denominator; None without sinks."""
        sinks = self.self_attn.sink_logits
        return None if sinks is None else sinks[...]

    @property
    def output_projection(self) -> Float[Array, "NV D"]:
        """Matrix after attention, with the rows of each query head in turn."""
        return self.self_attn.o_proj.kernel[...]

    def _branch(self, norm: Norm | None, out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what is added to the residual stream for the output of attention or the MLP."""
        out = _through(norm, out)
        return out if self.multiplier == 1.0 else out * self.multiplier


@jax.named_scope("residual")
def _add(x: Float[Array, "B T D"], branch: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x + branch


def _through(norm: Norm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


def _by_chunks(function: Callable[[jax.Array], jax.Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies a function of single tokens to at most `CHUNK_TOKENS` tokens at a time, in place."""
    tokens, rows = x.shape[1], max(x.shape[0] // meshes.size(DATA), 1)  # on each device
    chunk = min(max(CHUNK_TOKENS // rows, 1), tokens)

    def put(x: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        part = function(lax.dynamic_slice_in_dim(x, start, size, axis=1))
        return lax.dynamic_update_slice_in_dim(x, part, start, axis=1)

    if chunk == tokens:
        return function(x)
    chunks, rest = divmod(tokens, chunk)
    x = lax.fori_loop(0, chunks, lambda i, x: put(x, i * chunk, chunk), x)
    return put(x, chunks * chunk, rest) if rest else x


class Llama(nnx.Module):
    """Decoder-only transformer of the Llama kind (Llama 2, arXiv 2307.09288) in Flax NNX, for all model families.

    Norms, rotary embeddings and logits are computed in float32. Linear kernels are stored `[in, out]` and embeddings
    `[V, D]`, so that no matmul needs a transposed copy. Layers are separate modules, not one stacked array, so that
    per-layer caches update in place (docs/memory.md). `load` makes a model from a checkpoint.

    Args:
      config: the model's shape.
      dtype: dtype of parameters and activations: float32, bfloat16 or float16.
      rngs: source of the random initial parameters.

    Attributes:
      config: the model's shape.
      dtype: dtype of parameters and activations.
      mesh: the devices that the parameters are split over (`shard_model`); None for a single device.

    Raises:
      ValueError: `dtype` is not accepted.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = resolve_dtype(dtype)
        self.mesh: Mesh | None = None  # of the parameters, if on several devices (`models/partition.py`)
        build = functools.partial(Layer, config, dtype=self.dtype, rngs=rngs)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, param_dtype=self.dtype, rngs=rngs
        )
        self.layers = nnx.List([build(number) for number in range(config.num_hidden_layers)])
        self.norm = Norm(config, config.hidden_size, dtype=self.dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else linear(self.dtype, rngs)(config.hidden_size, config.vocab_size, use_bias=config.design.head_bias)
        )

    def window(self, layer: int) -> Window | None:
        """The sliding window or chunk of a layer; None if it sees all keys."""
        return self.config.window(layer)

    def softmax_options(self, layer: int) -> dict[str, Any]:
        """The arguments of the attention ops that change a layer's softmax: `soft_cap` and `sink_logits`."""
        return {"soft_cap": self.config.attn_logit_softcapping, "sink_logits": self.layers[layer].sink_logits}

    def output_projection(self, layer: int) -> Float[Array, "NV D"]:
        """The matrix after a layer's attention, with the rows of each query head in turn."""
        return self.layers[layer].output_projection

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds token ids `[B, T]` as the first layer's input `[B, T, D]`. Ids outside the vocabulary become NaN."""
        with jax.named_scope("embed"):
            x = jnp.take(self.embed_tokens.embedding[...], ids, axis=0, mode="fill")
            if self.config.embedding_multiplier != 1.0:
                x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
            return constrain(x, DATA)

    def forward(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        """Runs all layers and the final norm.

        Args:
          ids: token ids, int32 `[B, T]`.
          positions: their positions, from 0, int32 `[B, T]`.
          attend: `attend(layer, q[B, T, N, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, N, H]`, called once per layer
            in order. q and k are already normalised and rotated to `positions`.
          reduce: sums the partial results of attention and MLP over the devices of a mesh.

        Returns:
          Hidden states `[B, T, D]` in the model's dtype.

        Raises:
          ValueError: `T` exceeds `max_position_embeddings`.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit max_position_embeddings={self.config.max_position_embeddings}"
            )
        ropes = [self.config.rope(index) for index in range(len(self.layers))]
        tables = {rope: rotary_tables(rope, positions) for rope in dict.fromkeys(ropes)}  # [B, T, H/2] each
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x = layer(x, *tables[ropes[index]], self._attend(attend, index, positions), reduce)
        return self.norm(x)

    def _attend(self, attend: Attend, layer: int, positions: Array) -> Callable[..., Array]:
        rope = self.config.rope(layer)
        return lambda q, k, v: attend(layer, tuned(q, rope, positions), k, v)

    def logits(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """Computes next-token logits, float32 `[..., V]`, from hidden states `[..., D]` of `forward`."""
        product = functools.partial(jnp.einsum, precision=precision(self.dtype), preferred_element_type=jnp.float32)
        with jax.named_scope("logits"):
            if self.lm_head is None:
                logits = product("...d,vd->...v", hidden, self.embed_tokens.embedding[...])
            else:
                logits = product("...d,dv->...v", hidden, self.lm_head.kernel[...])
                if self.lm_head.bias is not None:
                    bias = self.lm_head.bias[...].astype(jnp.float32)
                    logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
            if self.config.vocab_size % meshes.size(MODEL) == 0:
                logits = constrain(
                    logits, DATA, *[None] * (logits.ndim - 2), MODEL
                )  # devices exchange logits, not weights
            logits = constrain(logits, DATA)
            if self.config.logit_multiplier != 1.0:
                logits = logits * self.config.logit_multiplier
            cap = self.config.final_logit_softcapping
            return logits if cap is None else cap * jnp.tanh(logits / cap)


def check_model(function: str, model: Any) -> None:
    """Raises ValueError, naming `function`, if its argument `model` is not a model."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        kind = type(model).__name__
        raise ValueError(f"{function}: model is a {kind}: expected a Llama, the first value that load returns")
