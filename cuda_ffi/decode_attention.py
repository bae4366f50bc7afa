"""Decode attention over packed keys and values and a full-precision tail, in one pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cuda_ffi import registration

HEAD_DIMS = (64, 96, 128, 256)
BITS = (2, 4)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
_MAX_WARPS = 2048  # on the whole device; more than any device holds with the largest config
_QUERIES = 8  # query heads of one KV head that are processed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning only: never changes the meaning.

    Attributes:
      warps: computing warps of a thread block, each with a private ring of copies; fewer where shared memory or
        registers are short. None: as many as a full cache gives work to, at least 2; where that is few, two or four
        times as many, which share the rings and each take a part of every tile.
      stages: stages of a ring; one holds the keys or the values of a tile.
    """

    warps: int | None = None
    stages: int = 2

    def __post_init__(self) -> None:
        if self.warps is not None and not 1 <= self.warps <= 16:
            raise ValueError(f"warps={self.warps}: expected 1 to 16")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"stages={self.stages}: expected 2 to 16")


def decode_attention(
    q: jax.Array,
    k_planes: tuple[jax.Array, ...],
    k_scale: jax.Array,
    k_zero: jax.Array,
    v_planes: tuple[jax.Array, ...],
    v_scale: jax.Array,
    v_zero: jax.Array,
    tail_k: jax.Array,
    tail_v: jax.Array,
    packed_length: jax.Array,
    tail_length: jax.Array,
    *,
    k_bits: int,
    v_bits: int,
    group_size: int,
    scale: float | None = None,
    k_factors: tuple[jax.Array, jax.Array] | None = None,
    v_factors: tuple[jax.Array, jax.Array] | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Attention of one query token over `packed_length[b]` packed and `tail_length[b]` full-precision tokens.

    Every valid slot is seen; what lies beyond the lengths may be anything, NaN included. Scales of the packed region
    must be at most 255 in magnitude (a group's range at most 765 at 2 bits, 3825 at 4), zeros within float16.

    Args:
      q: `[B, N, H]`, bfloat16.
      k_planes, v_planes: one uint32 array `[B, K, P * bits / 32, H]` each; `P` may be 0.
      k_scale, k_zero: `[B, K, P / g, H]`, float16, bfloat16 or float8_e4m3fn.
      v_scale, v_zero: `[B, K, P, H / g]`, the same dtype.
      tail_k, tail_v: `[B, K, C, H]` in q's dtype; `C` may be 0.
      packed_length: int32 `[B]`, multiples of the packing block, at most `P`.
      tail_length: int32 `[B]`, at most `C`.
      scale: softmax scale, positive; `H ** -0.5` unless given.
      k_factors, v_factors: (scale factor, zero factor), float32 `[B, K, P / Q, 1]`, for float8 metadata.
      config: tuning.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      ValueError: for shapes or dtypes that do not belong together.
      NotImplementedError: for a case the kernels do not cover, or where they cannot run.
    """
    shape = check(q, k_planes, k_scale, v_planes, v_scale, tail_k, k_bits=k_bits, v_bits=v_bits, group_size=group_size)
    registration.load()
    batch, heads, kv_heads, packed, head_dim = shape
    _check_shapes(
        shape,
        group_size,
        {
            "k_planes": (k_planes[0], packed * k_bits // 32, head_dim),
            "v_planes": (v_planes[0], packed * v_bits // 32, head_dim),
        }
        | {"k_scale": (k_scale, packed // group_size, head_dim), "k_zero": (k_zero, packed // group_size, head_dim)}
        | {"v_scale": (v_scale, packed, head_dim // group_size), "v_zero": (v_zero, packed, head_dim // group_size)}
        | {"tail_k": (tail_k, tail_k.shape[2], head_dim), "tail_v": (tail_v, tail_k.shape[2], head_dim)},
    )
    factors = (*(k_factors or ()), *(v_factors or ()))
    if k_scale.dtype == jnp.float8_e4m3fn:
        if len(factors) != 4:
            raise ValueError("float8_e4m3fn metadata needs k_factors and v_factors")
        rows = factors[0].shape[2]
        factor_block = packed // rows if rows else 16
    else:
        factors = (jnp.zeros((0,), jnp.float32),) * 4
        factor_block = 16
    softmax_scale = head_dim**-0.5 if scale is None else scale
    if not softmax_scale > 0:
        raise ValueError(f"scale={scale}: expected a positive number")
    config = config or Config()
    group = heads // kv_heads
    rows = batch * kv_heads * -(-group // _QUERIES)
    queries = min(group, _QUERIES)
    # Two segments a row, each with a slot for every warp that shares its tiles: up to four where tiles are few.
    slots = _MAX_WARPS + max(2 * rows, min(8 * rows, 2 * _MAX_WARPS))
    scratch = slots * (queries * head_dim + -(-2 * queries // 4) * 4)
    call = jax.ffi.ffi_call(
        "minikv_decode_attention",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((scratch,), jnp.float32)),
        input_output_aliases={0: 0},  # a loop that carries q to its output then copies nothing
    )
    out, _ = call(
        q,
        k_planes[0],
        k_scale,
        k_zero,
        v_planes[0],
        v_scale,
        v_zero,
        *factors,
        tail_k,
        tail_v,
        packed_length,
        tail_length,
        k_bits=np.int32(k_bits),
        v_bits=np.int32(v_bits),
        group_size=np.int32(group_size),
        factor_block=np.int32(factor_block),
        scale=np.float32(softmax_scale),
        warps=np.int32(config.warps or 0),  # 0: the handler chooses
        stages=np.int32(config.stages),
    )
    return out


def decode_unpacked(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """Attention of one query token over `lengths[b]` full-precision tokens, by cuDNN.

    Args:
      q: `[B, N, H]`, bfloat16 or float16.
      k, v: `[B, K, C, H]` in q's dtype. What lies beyond the lengths may be anything, NaN included.
      lengths: int32 `[B]`, at most `C`.
      scale: softmax scale; `H ** -0.5` unless given.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      NotImplementedError: for a case cuDNN does not cover, or where the kernels cannot run.
    """
    registration.load()
    batch, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    # cuDNN wants [B, S, K, H]: with every KV head a row of one head that is the layout in place.
    rows = (batch * kv_heads, tokens, 1, head_dim)
    out = jax.nn.dot_product_attention(
        q.reshape(batch * kv_heads, 1, heads // kv_heads, head_dim),
        k.reshape(rows),
        v.reshape(rows),
        scale=scale,
        query_seq_lengths=jnp.ones(batch * kv_heads, jnp.int32),
        key_value_seq_lengths=jnp.repeat(lengths, kv_heads),
        implementation="cudnn",
    )
    return out.reshape(q.shape)


def check(
    q: jax.Array,
    k_planes: tuple[jax.Array, ...],
    k_scale: jax.Array,
    v_planes: tuple[jax.Array, ...],
    v_scale: jax.Array,
    tail_k: jax.Array,
    *,
    k_bits: int,
    v_bits: int,
    group_size: int,
) -> tuple[int, int, int, int, int]:
    """Refuses what the kernels do not cover; looks at shapes and dtypes alone.

    Returns:
      `(B, N, K, P, H)`.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes that do not belong together.
    """
    for name, bits, planes in (("k_bits", k_bits, k_planes), ("v_bits", v_bits, v_planes)):
        if bits not in BITS:
            raise NotImplementedError(f"{name}={bits}: the CUDA decode kernel supports 2 and 4")
        if len(planes) != 1:
            raise ValueError(f"{len(planes)} planes for {name}={bits}: expected 1")
    if group_size not in GROUP_SIZES:
        raise NotImplementedError(f"group_size={group_size}: the CUDA decode kernel supports 16, 32, 64 and 128")
    if q.dtype != jnp.bfloat16:
        # The kernel rounds code * scale to float16: small against bfloat16's own rounding, too much against float16's.
        raise NotImplementedError(f"q.dtype={q.dtype}: the CUDA decode kernel supports bfloat16")
    if k_scale.dtype.name not in METADATA_DTYPES or v_scale.dtype != k_scale.dtype:
        raise NotImplementedError(
            f"metadata dtypes {k_scale.dtype}, {v_scale.dtype}: the CUDA decode kernel supports one of "
            f"{', '.join(METADATA_DTYPES)} for keys and values alike"
        )
    if q.ndim != 3 or tail_k.ndim != 4 or k_planes[0].ndim != 4:
        raise ValueError(
            f"shapes q {q.shape}, tail_k {tail_k.shape}, k_planes {k_planes[0].shape}: expected ranks 3, 4, 4"
        )
    if tail_k.dtype != q.dtype:
        raise ValueError(f"tail_k.dtype={tail_k.dtype}: expected q's, {q.dtype}")
    batch, heads, head_dim = q.shape
    kv_heads = tail_k.shape[1]
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={head_dim}: the CUDA decode kernel supports 64, 96, 128 and 256")
    if head_dim % group_size:
        raise NotImplementedError(f"group_size={group_size}: does not divide head_dim {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads: expected a multiple")
    return batch, heads, kv_heads, k_planes[0].shape[2] * (32 // k_bits), head_dim


def _check_shapes(shape: tuple[int, ...], group_size: int, arrays: dict[str, tuple[jax.Array, int, int]]) -> None:
    batch, _, kv_heads, packed, _ = shape
    if packed % max(16, group_size):
        raise ValueError(f"packed capacity {packed}: expected a multiple of {max(16, group_size)}")
    for name, (array, rows, columns) in arrays.items():
        if array.shape != (batch, kv_heads, rows, columns):
            raise ValueError(f"{name} has shape {array.shape}: expected {(batch, kv_heads, rows, columns)}")
