"""The decoder of all model families in Flax NNX: Llama, Mistral, Qwen2 and Qwen3 differ only in their config.

The model has no cache and calls no attention op. Attention is a callback, so prefill, decode and one-shot runs share
the model's code. Shape letters are those of docs/architecture.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.rotary import rotary_tables, rotate

# attend(layer, q[B, T, N, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, N, H]; q and k are normalised and rotated.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

# Sums the devices' partial results of a projection that is split by rows; called inside `jax.shard_map`.
Reduce = Callable[[jax.Array], jax.Array]

# Tokens per chunk of the MLP and of a prefill: enough to keep a matmul busy, and few enough that the MLP's three arrays
# of `intermediate_size` take about as much memory as attention does.
CHUNK_TOKENS = 1 << 14

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


# Projections of the same input are one matmul, so that a decode step runs fewer and longer kernels.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Joined(NamedTuple):
    """Column layout of a joined projection: `groups` times [columns of the first part | of the second | ...].

    A group is a KV head with its query heads, or the MLP columns on the same device as that head. Each device can then
    hold whole groups and needs no columns of the others.

    Attributes:
      groups: number of groups.
      widths: columns of each part within a group, in the order of `JOINED`.
    """

    groups: int
    widths: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.groups * sum(self.widths)

    def grouped(self, x: Float[Array, "B T C"]) -> Float[Array, "B T groups width"]:
        """Reshapes the projection's result to its groups."""
        return constrain(x.reshape(*x.shape[:-1], self.groups, -1), DATA, None, MODEL)


def joined(config: ModelConfig, module: str) -> Joined:
    """Returns the column layout of a joined projection, a key of `JOINED`."""
    h, kv_heads, wide = config.head_dim, config.num_key_value_heads, config.intermediate_size
    if module == "qkv_proj":
        return Joined(kv_heads, (config.num_attention_heads // kv_heads * h, h, h))
    groups = math.gcd(kv_heads, wide)
    return Joined(groups, (wide // groups, wide // groups))


def _linear(dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    return functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, precision=_precision(dtype), rngs=rngs)


def _precision(dtype: DTypeLike) -> lax.Precision | None:
    """The matmul precision that keeps float32 exact; a GPU's default is TF32, with 10 bits of mantissa."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def sum_over_devices(x: jax.Array) -> jax.Array:
    """Sums `x` over the devices of the axis "model" with XLA's collective."""
    return lax.psum(x, MODEL)


def _project_by_rows(linear: nnx.Linear, x: Float[Array, "B T F"], reduce: Reduce) -> Float[Array, "B T D"]:
    """Computes `linear(x)` with the rows of its kernel split over the devices of a mesh."""

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel, precision=linear.precision)

    def product_of_one_device(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if x.shape[0] * x.shape[1] > 1 or kernel.size >= 10**7:
            return product(x, kernel)
        # On a GPU, XLA turns one row times a matrix below this size into sums over products that it writes out (21 us
        # for 8 million numbers on an H200). Two equal rows stay a matmul.
        return product(lax.optimization_barrier(jnp.concatenate([x, x], axis=1)), kernel)[:, :1]

    kernel = linear.kernel[...]
    split = meshes.size(MODEL) > 1
    out = meshes.sum_of_products(x, kernel, product_of_one_device, reduce) if split else product(x, kernel)
    out = constrain(out, DATA)
    return out if linear.bias is None else out + linear.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, reduced in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, features: int, epsilon: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return normal.astype(x.dtype) * scale


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv 2305.13245): projections, norms and rotation around a callback `attend`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = _linear(dtype, rngs)
        d, h, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.joined = joined(config, "qkv_proj")
        self.qkv_proj = linear(d, self.joined.columns, use_bias=bias)
        self.o_proj = linear(config.num_attention_heads * h, d, use_bias=config.attention_bias)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.group, self.head_dim = config.num_attention_heads // config.num_key_value_heads, h

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        group, head_dim = self.group, self.head_dim
        batch, tokens, _ = x.shape
        qkv = self.joined.grouped(self.qkv_proj(x)).reshape(batch, tokens, -1, group + 2, head_dim)
        qk, v = qkv[:, :, :, : group + 1], qkv[:, :, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            qk = jnp.concatenate([self.q_norm(qk[:, :, :, :group]), self.k_norm(qk[:, :, :, group:])], axis=3)
        # Queries and keys are rotated together, which saves a kernel per layer.
        qk = rotate(qk.reshape(batch, tokens, -1, head_dim), cos, sin).reshape(qk.shape)
        q, k = qk[:, :, :, :group].reshape(batch, tokens, -1, head_dim), qk[:, :, :, group]
        out = attend(q, k, v)  # [B, T, N, H]
        return _project_by_rows(self.o_proj, out.reshape(batch, tokens, -1), reduce)


class MLP(nnx.Module):
    """Gated feed-forward block: `down(act(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(_linear(dtype, rngs), use_bias=config.mlp_bias)
        self.joined = joined(config, "gate_up_proj")
        self.gate_up_proj = linear(config.hidden_size, self.joined.columns)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"], reduce: Reduce = sum_over_devices) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.joined.grouped(self.gate_up_proj(x)), 2, axis=-1)  # [B, T, groups, F / groups] each
        return _project_by_rows(self.down_proj, (self.activation(gate) * up).reshape(*x.shape[:-1], -1), reduce)


class Layer(nnx.Module):
    """One pre-norm transformer layer: attention and MLP, each added to its input."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        reduce: Reduce = sum_over_devices,
    ) -> Float[Array, "B T D"]:
        with jax.named_scope("attention"):
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, reduce)
        with jax.named_scope("mlp"):
            return _by_chunks(lambda x: x + self.mlp(self.post_attention_layernorm(x), reduce), x)


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
        self.layers = nnx.List([build() for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=self.dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else _linear(self.dtype, rngs)(config.hidden_size, config.vocab_size, use_bias=False)
        )

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer: query `t` sees keys `t - window < s <= t`. None if it sees all keys."""
        return self.config.window(layer)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds token ids `[B, T]` as the first layer's input `[B, T, D]`. Ids outside the vocabulary become NaN."""
        with jax.named_scope("embed"):
            return constrain(jnp.take(self.embed_tokens.embedding[...], ids, axis=0, mode="fill"), DATA)

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
        cos, sin = rotary_tables(self.config, positions)  # [B, T, H/2]
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x = layer(x, cos, sin, functools.partial(attend, index), reduce)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """Computes next-token logits, float32 `[..., V]`, from hidden states `[..., D]` of `forward`."""
        product = functools.partial(jnp.einsum, precision=_precision(self.dtype), preferred_element_type=jnp.float32)
        with jax.named_scope("logits"):
            if self.lm_head is None:
                logits = product("...d,vd->...v", hidden, self.embed_tokens.embedding[...])
            else:
                logits = product("...d,dv->...v", hidden, self.lm_head.kernel[...])
            if self.config.vocab_size % meshes.size(MODEL) == 0:
                logits = constrain(
                    logits, DATA, *[None] * (logits.ndim - 2), MODEL
                )  # devices exchange logits, not weights
            return constrain(logits, DATA)


def check_model(function: str, model: Any) -> None:
    """Raises ValueError, naming `function`, if its argument `model` is not a model."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        kind = type(model).__name__
        raise ValueError(f"{function}: model is a {kind}: expected a Llama, the first value that load returns")
