"""Decode attention over a packed region and a full-precision tail, in one pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float

from cuda_ffi import registration
from cuda_ffi.arrays import PLANES, Packed, Region, Storage, check_packed, check_supported

HEAD_DIMS = (64, 96, 128, 256)
LONG_CACHE_BITS = (2, 4)
_KERNEL = "CUDA decode kernel"
_KERNELS = {None: 0, "short_cache": 1, "long_cache": 2}  # as the handler numbers them
_MAX_WARPS = 2048  # on the whole device: more than any device runs with the largest config
_QUERIES = 8  # query heads of one KV head that are processed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tuning of the decode kernel; changes nothing that it computes.

    Attributes:
      kernel: "short_cache", a kernel of little code, or "long_cache", which supports 2 and 4 bits. None: the faster one
        for the capacities, or the one that supports the bits.
      warps: computing warps per thread block, each with a private ring of copies; fewer if shared memory or registers
        are short. None: as many as a full cache has work for, at least 2. If those are few, teams of two or four warps
        share a ring and split every tile. The kernel for short caches has no rings, and its warps work in pairs.
      stages: stages per ring; one holds the keys or the values of a tile.
    """

    kernel: str | None = None
    warps: int | None = None
    stages: int = 2

    def __post_init__(self) -> None:
        if self.kernel not in _KERNELS:
            raise ValueError(f"kernel={self.kernel!r}: expected short_cache, long_cache or None")
        if self.warps is not None and not 1 <= self.warps <= 16:
            raise ValueError(f"warps={self.warps}: expected 1 to 16")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"stages={self.stages}: expected 2 to 16")


def decode_attention(
    q: BFloat16[Array, "B N H"],
    packed: Region[Packed],
    tail: Region[Array],
    *,
    storage: Storage,
    scale: float,
    config: Config | None = None,
) -> BFloat16[Array, "B N H"]:
    """Attention of one query token per row over the packed tokens and the tail.

    Attends to every valid slot; slots beyond the lengths may hold anything, NaN included. Scales of the packed region
    must be at most 255 in magnitude (a group's range at most 765 at 2 bits, 1785 at 3, 3825 at 4), zeros within
    float16.

    Args:
      q: `[B, N, H]`, bfloat16.
      packed: keys and values of capacity `P`, which may be 0; lengths are multiples of the packing block.
      tail: keys and values `[B, K, C, H]` in q's dtype; `C` may be 0.
      storage: bits and group size of `packed`.
      scale: softmax scale, positive.
      config: tuning.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      ValueError: for shapes or dtypes that do not match.
      NotImplementedError: for a case the kernel does not support, or if it cannot run here.
    """
    config = config or Config()
    check(q, packed, tail, storage)
    if config.kernel == "long_cache":
        bits = (("k_bits", storage.k_bits, LONG_CACHE_BITS), ("v_bits", storage.v_bits, LONG_CACHE_BITS))
        check_supported(f"{_KERNEL} for long caches", *bits)
    registration.load()
    _check_shapes(packed, tail, storage)
    if not scale > 0:
        raise ValueError(f"scale={scale}: expected a positive number")
    call = jax.ffi.ffi_call(
        "minikv_decode_attention",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((_scratch_size(q, tail),), jnp.float32)),
        input_output_aliases={0: 0},  # saves a copy in a loop whose carry is both q and the output
    )
    factors, factor_block = _factors(packed, storage)
    out, _ = call(
        q,
        *(*_planes(packed.k), packed.k.scale, packed.k.zero),
        *(*_planes(packed.v), packed.v.scale, packed.v.zero),
        *factors,
        *(tail.k, tail.v, packed.length, tail.length),
        k_bits=np.int32(storage.k_bits),
        v_bits=np.int32(storage.v_bits),
        group_size=np.int32(storage.group_size),
        factor_block=np.int32(factor_block),
        scale=np.float32(scale),
        kernel=np.int32(_KERNELS[config.kernel]),
        warps=np.int32(config.warps or 0),  # 0: the handler chooses
        stages=np.int32(config.stages),
    )
    return out


def decode_unpacked(q: Float[Array, "B N H"], tail: Region[Array], *, scale: float) -> Float[Array, "B N H"]:
    """Attention of one query token per row over full-precision tokens, by cuDNN.

    Args:
      q: `[B, N, H]`, bfloat16 or float16.
      tail: keys and values `[B, K, C, H]` in q's dtype. Slots beyond the lengths may hold anything, NaN included.
      scale: softmax scale.

    Returns:
      `[B, N, H]` in q's dtype. A row without tokens gives zeros.

    Raises:
      NotImplementedError: for a case cuDNN does not support, or if the kernels cannot run here.
    """
    registration.load()
    batch, heads, head_dim = q.shape
    kv_heads, tokens = tail.k.shape[1:3]
    # cuDNN wants [B, S, K, H]. With every KV head as a row of one head, that is the layout in place.
    rows = (batch * kv_heads, tokens, 1, head_dim)
    out = jax.nn.dot_product_attention(
        q.reshape(batch * kv_heads, 1, heads // kv_heads, head_dim),
        tail.k.reshape(rows),
        tail.v.reshape(rows),
        scale=scale,
        query_seq_lengths=jnp.ones(batch * kv_heads, jnp.int32),
        key_value_seq_lengths=jnp.repeat(tail.length, kv_heads),
        implementation="cudnn",
    )
    return out.reshape(q.shape)


def check(q: jax.Array, packed: Region[Packed], tail: Region[Array], storage: Storage) -> None:
    """Refuses what the kernel does not support, from shapes and dtypes.

    Raises:
      NotImplementedError: naming the value and what is supported.
      ValueError: for shapes that do not match.
    """
    check_packed(_KERNEL, packed, storage)
    # The kernel rounds code * scale to float16: small against bfloat16's own rounding, too much against float16's.
    check_supported(_KERNEL, ("q.dtype", q.dtype.name, ("bfloat16",)))
    if q.ndim != 3 or tail.k.ndim != 4 or packed.k.planes[0].ndim != 4:
        raise ValueError(
            f"shapes q {q.shape}, tail.k {tail.k.shape}, packed.k.planes {packed.k.planes[0].shape}: "
            "expected ranks 3, 4, 4"
        )
    if tail.k.dtype != q.dtype:
        raise ValueError(f"tail.k.dtype={tail.k.dtype}: expected q's, {q.dtype}")
    heads, head_dim = q.shape[1:]
    kv_heads = tail.k.shape[1]
    check_supported(_KERNEL, ("head_dim", head_dim, HEAD_DIMS))
    if head_dim % storage.group_size:
        raise NotImplementedError(f"group_size={storage.group_size}: does not divide head_dim {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} KV heads: expected a multiple")


def _capacity(packed: Region[Packed], storage: Storage) -> int:
    """Tokens that the packed region has room for."""
    return packed.k.planes[0].shape[2] * (32 // PLANES[storage.k_bits][0])


def _planes(side: Packed) -> tuple[Array, ...]:
    """The plane of the lower bits and that of a third bit, empty if there is none."""
    return (*side.planes, jnp.zeros((0,), jnp.uint32))[:2]


def _check_shapes(packed: Region[Packed], tail: Region[Array], storage: Storage) -> None:
    capacity, group_size = _capacity(packed, storage), storage.group_size
    block = max(storage.packing_block, 16)
    if capacity % block:
        raise ValueError(f"packed capacity {capacity}: expected a multiple of {block}")
    batch, kv_heads, tail_capacity, head_dim = tail.k.shape
    planes = [
        (f"packed.{name}.planes[{i}]", side.planes[i], capacity * width // 32, head_dim)
        for name, side, bits in (("k", packed.k, storage.k_bits), ("v", packed.v, storage.v_bits))
        for i, width in enumerate(PLANES[bits])
    ]
    for name, array, rows, columns in (
        *planes,
        ("packed.k.scale", packed.k.scale, capacity // group_size, head_dim),
        ("packed.k.zero", packed.k.zero, capacity // group_size, head_dim),
        ("packed.v.scale", packed.v.scale, capacity, head_dim // group_size),
        ("packed.v.zero", packed.v.zero, capacity, head_dim // group_size),
        ("tail.v", tail.v, tail_capacity, head_dim),
    ):
        if array.shape != (batch, kv_heads, rows, columns):
            raise ValueError(f"{name} has shape {array.shape}: expected {(batch, kv_heads, rows, columns)}")


def _factors(packed: Region[Packed], storage: Storage) -> tuple[tuple[Array, ...], int]:
    """The four arrays of factors, empty for 16-bit metadata, and the tokens that share a factor."""
    if packed.k.factors is None or packed.v.factors is None:
        return (jnp.zeros((0,), jnp.float32),) * 4, 16
    blocks = packed.k.factors[0].shape[2]
    return (*packed.k.factors, *packed.v.factors), _capacity(packed, storage) // blocks if blocks else 16


def _scratch_size(q: jax.Array, tail: Region[Array]) -> int:
    """Floats of scratch: a slot for every warp, and two segments for every row."""
    batch, heads, head_dim = q.shape
    kv_heads = tail.k.shape[1]
    group = heads // kv_heads
    rows = batch * kv_heads * -(-group // _QUERIES)
    queries = min(group, _QUERIES)
    # Each of a row's two segments has a slot for every warp that shares its tiles: up to four if tiles are few.
    slots = _MAX_WARPS + max(2 * rows, min(8 * rows, 2 * _MAX_WARPS))
    return slots * (queries * head_dim + -(-2 * queries // 4) * 4)
