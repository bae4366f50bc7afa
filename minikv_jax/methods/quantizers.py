"""How kept tokens are stored: the quantisers by name, and what the cache calls to store and to read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax import packing as quantization
from minikv_jax.methods.base import QUANTIZERS, Kind, Operand, Quantizer, register_quantizer
from minikv_jax.methods.config import PLANES, CacheConfig
from minikv_jax.ops import decode_attention as attention
from minikv_jax.packing import Axis, QuantizedArray, StoredArray

Packed = QuantizedArray | StoredArray

_AXES: dict[Kind, Axis] = {"keys": "tokens", "values": "channels"}


def quantize(x: Float[Array, "B K S H"], operand: Operand, implementation: str | None = None) -> Packed:
    """Stores `S` tokens, a multiple of the packing block.

    Raises:
      NotImplementedError: an `implementation` that has no kernel for the method's quantiser.
    """
    config = operand.config
    quantizer = QUANTIZERS[config.quantizer]
    if packs_by_minmax(config):  # the rule that the op and its kernels know
        return attention.quantize(x, **minmax_arguments(operand), implementation=implementation)
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"quantize: quantizer={config.quantizer!r} has no {implementation!r} kernel; implementation='xla' runs it"
        )
    stored = quantizer.quantize(x, operand)
    return stored if isinstance(stored, QuantizedArray) else StoredArray(stored, x.shape[2])


def packs_by_minmax(config: CacheConfig) -> bool:
    """Whether codes come from `MinMax.quantize` itself, whatever the rotation: what a kernel that packs may replace."""
    return getattr(type(QUANTIZERS[config.quantizer]), "quantize", None) is MinMax.quantize


def dequantize(packed: Packed, operand: Operand, dtype: DTypeLike) -> Float[Array, "B K S H"]:
    """The tokens that `packed` stands for, rounded to `dtype` once."""
    stored = packed.arrays if isinstance(packed, StoredArray) else packed
    return QUANTIZERS[operand.config.quantizer].dequantize(stored, operand).astype(dtype)


def rotate(x: Float[Array, "*lead H"], operand: Operand, *, back: bool = False) -> Float[Array, "*lead H"]:
    """Turns vectors into the basis in which the cache holds `operand`, or back out of it."""
    if not operand.config.quantized:
        return x
    rotation = QUANTIZERS[operand.config.quantizer].rotation(operand, x.shape[-1])
    if rotation is None:
        return x
    rotation = rotation.T if back else rotation
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(x.astype(jnp.float32), rotation.astype(jnp.float32), precision=exact).astype(x.dtype)


def block_bytes(config: CacheConfig, layer: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of one packing block's keys and values, of all heads of a row, from the shapes the quantiser returns."""
    block = jax.ShapeDtypeStruct((1, kv_heads, config.packing_block, head_dim), dtype)
    stored = [
        jax.eval_shape(lambda x, operand=operand: quantize(x, operand), block)
        for operand in (Operand("keys", layer, config), Operand("values", layer, config))
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def minmax_arguments(operand: Operand) -> dict[str, Any]:
    """How `quantization.quantize` and `encode` are told to store an operand."""
    config = operand.config
    return {
        "bits": operand.bits,
        "group_size": config.group_size,
        "axis": _AXES[operand.kind],
        "metadata_dtype": config.metadata_dtype,
        "factor_block": config.packing_block,
    }


def _word(config: CacheConfig) -> int:
    """Tokens in a word of the narrowest plane."""
    assert config.k_bits is not None and config.v_bits is not None
    return 32 // min(PLANES[config.k_bits] + PLANES[config.v_bits])


@register_quantizer("minmax")
class MinMax(Quantizer):
    """Asymmetric min/max in groups, keys per channel and values per token (KIVI eq. 1; MiniKV section 3.2)."""

    def block(self, config: CacheConfig) -> int:
        """The smallest count that fills whole groups and whole words."""
        return max(config.group_size, _word(config))

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        return quantization.quantize(x, **minmax_arguments(operand))

    def dequantize(self, stored: QuantizedArray, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return quantization.dequantize(stored)


@register_quantizer("hadamard")
class Hadamard(MinMax):
    """Min/max of keys and values turned by a Hadamard matrix, which spreads outlying channels (QuaRot section 4.2)."""

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        del operand
        return jnp.asarray(hadamard(head_dim))


def hadamard(size: int) -> np.ndarray:
    """An orthogonal float32 `[H, H]`: Sylvester's matrix of the largest power of two dividing `H`, block by block."""
    block = np.ones((1, 1), np.float32)
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block), dtype=np.float32), block / np.sqrt(np.float32(len(block))))


@register_quantizer("rtn")
class RoundToNearest(Quantizer):
    """Min/max per token, of keys too: groups of `group_size` channels, so that 64 or 128 may be a whole head.

    FlexGen's group-wise quantisation of the cache (arXiv 2303.06865), which KIVI (section 3) measures its keys against.
    The kernels read keys grouped by tokens only; the dict makes this a layout of its own.
    """

    def block(self, config: CacheConfig) -> int:
        return max(config.group_size, _word(config))

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, QuantizedArray]:
        arguments = minmax_arguments(operand)
        arguments["axis"] = "channels"
        return {"packed": quantization.quantize(x, **arguments)}

    def dequantize(self, stored: dict[str, QuantizedArray], operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return quantization.dequantize(stored["packed"])


@register_quantizer("hqq", iterations=20, norm=0.7, beta=10.0, growth=1.01)
class HalfQuadratic(MinMax):
    """Zeros that minimise a sparse norm of the error, under min/max scales (HQQ, Badri and Shaji 2023).

    Half-quadratic splitting: `e = shrink(x - r)`, then `zero = mean(x - e - code * scale)`, with `beta` growing. Of all
    steps each group keeps the one with the least mean absolute error; HQQ stops all groups at once where it grows.
    """

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> QuantizedArray:
        config, arguments = operand.config, minmax_arguments(operand)
        bits, axis = arguments["bits"], arguments["axis"]
        groups = quantization.grouped(x, config.group_size, axis)
        reduced = -2 if axis == "tokens" else -1
        low, steps = quantization.minmax(groups, bits, axis)
        scale = jnp.expand_dims(jnp.where(steps > 0, steps, 1.0), reduced)
        power = config.option("norm") - 1

        def restored(zero: Array) -> Array:
            return jnp.clip(jnp.round((groups - zero) / scale), 0, (1 << bits) - 1) * scale

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            zero, best, least = state
            codes = restored(zero)
            gap = groups - codes - zero
            error = jnp.mean(jnp.abs(gap), axis=reduced, keepdims=True)
            best, least = jnp.where(error < least, zero, best), jnp.minimum(error, least)
            size, beta = jnp.abs(gap), config.option("beta") * config.option("growth") ** i
            sparse = jnp.sign(gap) * jnp.maximum(size - jnp.where(size > 0, size, 1.0) ** power / beta, 0.0)
            return jnp.mean(groups - sparse - codes, axis=reduced, keepdims=True), best, least

        zero = jnp.expand_dims(low, reduced)
        start = zero, zero, jnp.full_like(zero, jnp.inf)
        _, best, _ = jax.lax.fori_loop(0, config.option("iterations") + 1, step, start)
        return quantization.encode(x, jnp.squeeze(best, reduced), steps, **arguments)


@register_quantizer("turboquant", seed=0)
class TurboQuant(Quantizer):
    """Norm and direction: a random rotation, then the best scalar codebook for a coordinate of a random unit vector.

    TurboQuant-MSE (Zandieh et al. 2025, arXiv 2504.19874, algorithm 1), with one norm per token in `metadata_dtype`.
    """

    bits = (1, 2, 3, 4)

    def block(self, config: CacheConfig) -> int:
        return _word(config)

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"]:
        return jnp.asarray(random_rotation(head_dim, operand.config.option("seed")))

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, Any]:
        if operand.config.metadata_dtype == "float8_e4m3fn":
            raise ValueError("metadata_dtype='float8_e4m3fn': expected float16 or bfloat16 for the norms of turboquant")
        x = x.astype(jnp.float32)
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        levels = lloyd_max(x.shape[-1], operand.bits)
        unit = x / jnp.where(norm == 0, 1.0, norm)
        codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), unit).astype(jnp.uint32)
        largest = float(jnp.finfo(operand.config.metadata_dtype).max)
        stored = jnp.minimum(norm, largest).astype(operand.config.metadata_dtype)
        return {"planes": quantization.pack(codes, operand.bits), "norm": stored}

    def dequantize(self, stored: dict[str, Any], operand: Operand) -> Float[Array, "B K S H"]:
        codes = quantization.unpack(stored["planes"], operand.bits)
        levels = jnp.asarray(lloyd_max(codes.shape[-1], operand.bits))
        return levels[codes] * stored["norm"].astype(jnp.float32)


@functools.cache
def random_rotation(size: int, seed: int) -> np.ndarray:
    """A uniformly random orthogonal float32 `[H, H]`."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@functools.cache
def lloyd_max(size: int, bits: int) -> np.ndarray:
    """The `2**bits` float32 levels of least mean squared error for a coordinate of a random unit vector of `size`.

    Its density is `(1 - x**2) ** ((size - 3) / 2)`. Lloyd's iteration, on a fine grid.
    """
    grid = np.linspace(-1, 1, 200_001)[1:-1]
    density = np.exp((size - 3) / 2 * np.log1p(-(grid**2)))
    mass, moment = np.cumsum(density), np.cumsum(density * grid)
    levels = grid[np.searchsorted(mass / mass[-1], (np.arange(1 << bits) + 0.5) / (1 << bits))]
    for _ in range(1000):
        edges = np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        parts = [np.diff(total[edges - 1], prepend=0.0, append=total[-1]) for total in (moment, mass)]
        new = parts[0] / parts[1]
        done, levels = np.abs(new - levels).max() < 1e-9, new
        if done:
            break
    return levels.astype(np.float32)


# The sizes of a four-bit float (E2M1), and the midpoints between them; a tie goes to the even code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_MIDPOINTS = (_E2M1[1:] + _E2M1[:-1]) / 2


@register_quantizer("nvfp4")
class NVFP4(Quantizer):
    """Four-bit floats (E2M1), an 8-bit scale per 16 channels of a token, a float32 factor per block of tokens and head.

    The format of NVIDIA's Blackwell ("Introducing NVFP4", 2025), computed in plain JAX. The second level is over 32
    tokens here, not a whole tensor, so that blocks do not depend on one another.
    """

    bits = (4,)

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> dict[str, Any]:
        block, groups = self.block(operand.config), quantization.grouped(x, 16, "channels")  # [B, K, S, H/16, 16]
        wanted = jnp.max(jnp.abs(groups), axis=-1) / _E2M1[-1]  # [B, K, S, H/16]
        tiles = wanted.reshape(*wanted.shape[:2], -1, block * wanted.shape[-1])
        factor = jnp.max(tiles, axis=-1, keepdims=True) / 448  # float8_e4m3fn reaches 448
        scale = (tiles / jnp.where(factor == 0, 1.0, factor)).astype(jnp.float8_e4m3fn)
        used = (scale.astype(jnp.float32) * factor).reshape(wanted.shape)[..., None]
        ratio = groups / jnp.where(used == 0, 1.0, used)
        size, even = jnp.abs(ratio)[..., None], np.arange(7) % 2 == 0
        above = jnp.where(even, size > _E2M1_MIDPOINTS, size >= _E2M1_MIDPOINTS)
        codes = jnp.sum(above, axis=-1, dtype=jnp.uint32) + 8 * (ratio < 0).astype(jnp.uint32)
        return {
            "planes": quantization.pack(codes.reshape(x.shape), 4),
            "scale": scale.reshape(wanted.shape),
            "factor": factor,
        }

    def dequantize(self, stored: dict[str, Any], operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        codes = quantization.unpack(stored["planes"], 4)
        values = jnp.concatenate([jnp.asarray(_E2M1), -jnp.asarray(_E2M1)])[codes]
        scale = stored["scale"].astype(jnp.float32)
        tiles = scale.reshape(*stored["factor"].shape[:-1], -1) * stored["factor"]
        groups = quantization.grouped(values, 16, "channels")
        return (groups * tiles.reshape(scale.shape)[..., None]).reshape(values.shape)


@register_quantizer("fp8", format="e4m3")
class Float8(Quantizer):
    """Eight-bit floats without a scale, saturating: `format` e4m3 or e5m2 (arXiv 2209.05433, table 1)."""

    bits = (8,)

    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> Array:
        name = operand.config.option("format")
        if name not in ("e4m3", "e5m2"):
            raise ValueError(f"format={name!r}: expected e4m3 or e5m2")
        dtype = jnp.float8_e4m3fn if name == "e4m3" else jnp.float8_e5m2
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(x.astype(jnp.float32), -largest, largest).astype(dtype)

    def dequantize(self, stored: Array, operand: Operand) -> Float[Array, "B K S H"]:
        del operand
        return stored.astype(jnp.float32)
