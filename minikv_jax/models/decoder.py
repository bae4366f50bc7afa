"""The decoder in Flax NNX: Llama, Mistral, Qwen2 and Qwen3 differ in config only.

The model owns no cache and knows no attention op: attention is a callback, so that prefill, decode and one-shot runs
share one body. Shape letters are those of docs/architecture.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax.models.config import DTYPES, ModelConfig
from minikv_jax.models.rotary import rotary_tables, rotate

# attend(layer, q[B, T, N, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, N, H]; q and k come normalised and rotated.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]

# Tokens that an MLP, or a prefill, runs at a time: enough to keep a matmul busy, and few enough that the MLP's three
# arrays of `intermediate_size` take about the memory that attention takes for as many tokens.
CHUNK_TOKENS = 1 << 14

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


# Projections of the same input are one matmul: a decode step then waits for fewer kernels, each of which reads longer.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def joined_widths(config: ModelConfig, module: str) -> dict[str, int]:
    """The columns of a joined projection that belong to each of its parts, in order."""
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    wide = config.intermediate_size
    columns = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": wide, "up_proj": wide}
    return {name: columns[name] for name in JOINED[module]}


def _linear(dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    return functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, precision=_precision(dtype), rngs=rngs)


def _precision(dtype: DTypeLike) -> lax.Precision | None:
    """Keeps float32 exact: a GPU would by default round a matmul's float32 factors to TF32, which has 10 bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, reduced in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, epsilon: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return normal.astype(x.dtype) * scale


class Attention(nnx.Module):
    """Grouped-query self-attention around the caller's `attend`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = _linear(dtype, rngs)
        d, h, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.qkv_proj = linear(d, sum(joined_widths(config, "qkv_proj").values()), use_bias=bias)
        self.o_proj = linear(config.num_attention_heads * h, d, use_bias=config.attention_bias)
        self.q_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.heads = config.num_attention_heads, config.num_key_value_heads, h

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T H2"],
        sin: Float[Array, "B T H2"],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> Float[Array, "B T D"]:
        query_heads, kv_heads, head_dim = self.heads
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], -1, head_dim)  # [B, T, N + 2K, H]
        qk, v = jnp.split(qkv, (query_heads + kv_heads,), axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = jnp.split(qk, (query_heads,), axis=2)
            qk = jnp.concatenate([self.q_norm(q), self.k_norm(k)], axis=2)
        q, k = jnp.split(rotate(qk, cos, sin), (query_heads,), axis=2)  # turned together: one kernel less per layer
        out = attend(q, k, v)  # [B, T, N, H]
        return self.o_proj(out.reshape(*x.shape[:2], -1))  # [B, T, D]


class MLP(nnx.Module):
    """Gated feed-forward block: `down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(_linear(dtype, rngs), use_bias=config.mlp_bias)
        self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)  # [B, T, F] each
        return self.down_proj(self.activation(gate) * up)


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

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
    ) -> Float[Array, "B T D"]:
        with jax.named_scope("attention"):
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        with jax.named_scope("mlp"):
            return _by_chunks(lambda x: x + self.mlp(self.post_attention_layernorm(x)), x)


def _by_chunks(function: Callable[[jax.Array], jax.Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies `function`, which treats tokens separately, to at most `CHUNK_TOKENS` tokens at a time, in place."""
    tokens = x.shape[1]
    size = min(max(CHUNK_TOKENS // x.shape[0], 1), tokens)

    def put(x: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        part = function(lax.dynamic_slice_in_dim(x, start, size, axis=1))
        return lax.dynamic_update_slice_in_dim(x, part, start, axis=1)

    if size == tokens:
        return function(x)
    chunks, rest = divmod(tokens, size)
    x = lax.fori_loop(0, chunks, lambda i, x: put(x, i * size, size), x)
    return put(x, chunks * size, rest) if rest else x


class Llama(nnx.Module):
    """A Llama-like decoder. Parameters and activations have `dtype`; norms, rotary and logits are computed in float32.

    Linear kernels are stored `[in, out]` and embeddings `[V, D]`, so that no matmul needs a transposed copy. Layers are
    separate modules, not one stacked array: per-layer caches then update in place (docs/memory.md).
    Raises ValueError for a dtype other than float32, bfloat16 and float16.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = resolve_dtype(dtype)
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
        """The sliding window of a layer: query `t` sees keys `t - window < s <= t`. None if it sees all."""
        return self.config.window(layer)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The input of the first layer. An id outside the vocabulary embeds to NaN."""
        with jax.named_scope("embed"):
            return jnp.take(self.embed_tokens.embedding[...], ids, axis=0, mode="fill")

    def forward(self, ids: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend) -> Float[Array, "B T D"]:
        """Runs all layers and the final norm.

        `attend(layer, q[B, T, N, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, N, H]` is called once per layer, in order,
        with q and k already normalised and rotated to `positions`.
        Raises ValueError if T exceeds the model's positions.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit max_position_embeddings={self.config.max_position_embeddings}"
            )
        cos, sin = rotary_tables(self.config, positions)  # [B, T, H/2]
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x = layer(x, cos, sin, functools.partial(attend, index))
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """Scores of every vocabulary entry as the next token after `hidden` (from `forward`), in float32."""
        product = functools.partial(jnp.einsum, precision=_precision(self.dtype), preferred_element_type=jnp.float32)
        with jax.named_scope("logits"):
            if self.lm_head is None:
                return product("...d,vd->...v", hidden, self.embed_tokens.embedding[...])
            return product("...d,dv->...v", hidden, self.lm_head.kernel[...])


def check_model(function: str, model: Any) -> None:
    """Raises ValueError if there is no model's config in what `function` was given."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise ValueError(
            f"{function}: model is a {type(model).__name__}: expected a Llama, the first of what load gives"
        )


def resolve_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Turns a name or type into a model's dtype. Raises ValueError naming the accepted ones."""
    try:
        resolved = jnp.dtype("none" if dtype is None else dtype)  # None would be float64
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}") from error
    if resolved.name not in DTYPES:
        raise ValueError(f"dtype={resolved.name!r}: expected one of {', '.join(DTYPES)}")
    return resolved
