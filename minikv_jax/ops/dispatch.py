"""How the ops reach the kernel packages: the cache's arrays in a kernel's arguments, and what runs first where.

Each function here raises NotImplementedError with the reason where its kernel cannot run the case, before any work.
The kernel packages are imported on first use: they need nothing of this one, and this one runs without them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.methods.config import PLANES
from minikv_jax.packing import Axis, QuantizedArray

if TYPE_CHECKING:
    from minikv_jax.cache.state import LayerCache

IMPLEMENTATIONS = ("xla", "pallas", "cuda")
_KERNELS_FIRST = ("cuda", "pallas", "xla")
_ALIKE = 1.05  # times of one kernel in two runs differ by as much: within it the first of _KERNELS_FIRST runs
_RESULTS = pathlib.Path(__file__).parents[1] / "bench" / "results"

_log = logging.getLogger("minikv_jax")
Result = TypeVar("Result")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it is None or one of `IMPLEMENTATIONS`."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def run(
    op: str, implementation: str | None, sizes: Mapping[str, int], runners: Mapping[str, Callable[[], Result]]
) -> Result:
    """Runs an op as asked, or by the fastest implementation that takes the case.

    Args:
      op: its name.
      implementation: one by name, which then runs or raises; None tries `order(op, sizes)` one after the other.
      sizes: what the recorded measurements are told apart by.
      runners: the implementations there are; "xla" is always one of them.

    Raises:
      ValueError: an unknown implementation. NotImplementedError: a named one that cannot run this case.
    """
    check_implementation(implementation)
    if implementation is not None:
        if implementation not in runners:
            raise NotImplementedError(f"{op}: no {implementation!r} kernel; implementation='xla' runs everywhere")
        return runners[implementation]()
    for name in order(op, sizes):
        if name not in runners:
            continue
        if name == "xla":
            break
        try:
            result = runners[name]()
        except NotImplementedError as error:
            _log.info("%s %s: not %s: %s", op, dict(sizes), name, error)
            continue
        _log.info("%s %s: %s", op, dict(sizes), name)
        return result
    _log.info("%s %s: xla", op, dict(sizes))
    return runners["xla"]()


def order(op: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Implementations to try, best first: by the nearest recorded shape, kernels before XLA.

    What was recorded on this kind of device counts or, where nothing was, on those of its compute capability.
    """
    if jax.default_backend() != "gpu":
        return ("xla",)
    device = jax.devices()[0]
    rows = [row for row in _recorded(device.device_kind, device.compute_capability) if row["op"] == op]
    if not rows:
        return _KERNELS_FIRST
    nearest = min((row["sizes"] for row in rows), key=lambda recorded: _distance(recorded, sizes))
    # Sizes do not tell all rows apart (by the axis packed along, say): the mean of an implementation's rows counts.
    measured: dict[str, list[float]] = {}
    for row in rows:
        if row["sizes"] == nearest:
            measured.setdefault(row["implementation"], []).append(row["ms"])
    times = {name: statistics.mean(ms) for name, ms in measured.items()}
    alike = _ALIKE * min(times.values())

    def rank(name: str) -> tuple[float, int]:
        time = times.get(name, math.inf)
        return (0.0 if time <= alike else time, _KERNELS_FIRST.index(name))

    return tuple(sorted(_KERNELS_FIRST, key=rank))


@functools.cache
def _recorded(device_kind: str, compute_capability: str) -> tuple[dict, ...]:
    """Benchmark rows of this kind of device or, where there are none, of one of the same compute capability."""
    reports = [json.loads(path.read_text()) for path in sorted(_RESULTS.glob("kernels_*.json"))]
    own = [report for report in reports if report["device"] == device_kind]
    alike = [report for report in reports if report["compute_capability"] == compute_capability]
    return tuple(row for report in (own or alike)[:1] for row in report["results"])


def _distance(recorded: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log2(max(recorded[name], 1) / max(sizes[name], 1))) for name in sizes if name in recorded)


def prefill_attention(
    implementation: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    window: int | None,
    with_scores: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T"] | None]:
    """`attention.prefill_attention` by a kernel package."""
    package = _package(implementation)
    return package.prefill_attention(q, k, v, lengths, scale=scale, window=window, with_scores=with_scores)


def quantize(
    implementation: str,
    x: Float[Array, "B K S H"],
    *,
    bits: int,
    group_size: int,
    axis: Axis,
    metadata_dtype: str,
    factor_block: int | None,
) -> QuantizedArray:
    """`attention.quantize` by a kernel package."""
    options: dict[str, Any] = {"metadata_dtype": metadata_dtype}
    if metadata_dtype == "float8_e4m3fn":  # 16-bit metadata have no factors
        options["factor_block"] = factor_block or max(group_size, 32 // min(PLANES[bits]))
    out = _package(implementation).quantize(x, bits=bits, group_size=group_size, axis=axis, **options)
    factors = out.factors or (None, None)
    return QuantizedArray(out.planes, out.scale, out.zero, *factors, bits=bits, group_size=group_size, axis=axis)


def decode_attention(
    implementation: str, q: Float[Array, "B N H"], layer: LayerCache, *, scale: float
) -> Float[Array, "B N H"]:
    """`attention.decode_attention` by a kernel package; under "cuda" by cuDNN where nothing is packed."""
    k, v = _packed(layer)
    package = _package(implementation)
    packed, tail = _regions(package, layer, k, v)
    if implementation == "cuda" and layer.k is None:
        return package.decode_unpacked(q, tail, scale=scale)
    return package.decode_attention(q, packed, tail, storage=_storage(package, k, v), scale=scale)


def cuda_append(
    layer: LayerCache, k: Float[Array, "B K H"], v: Float[Array, "B K H"], count: Int[Array, "B"]
) -> LayerCache:
    """`cache.append` of one token a row by `cuda_ffi`: in place, a full tail packed in the same call."""
    import cuda_ffi
    from minikv_jax.methods.quantizers import packs_by_minmax

    if layer.k is None:
        raise NotImplementedError("append: the CUDA kernel appends to quantised caches only")
    if not packs_by_minmax(layer.config):
        raise NotImplementedError(f"append: the CUDA kernel packs by min/max, not quantizer={layer.config.quantizer!r}")
    old_k, old_v = _packed(layer)
    packed, tail = _regions(cuda_ffi, layer, old_k, old_v)
    packed, tail = cuda_ffi.append(
        k,
        v,
        count,
        packed,
        tail,
        storage=_storage(cuda_ffi, old_k, old_v),
        sinks=layer.config.sinks,
        block=layer.config.flush_block,
    )

    def stored(old: QuantizedArray, new: cuda_ffi.Packed) -> QuantizedArray:
        scale_factor, zero_factor = new.factors or (None, None)
        return dataclasses.replace(
            old, planes=new.planes, scale=new.scale, zero=new.zero, scale_factor=scale_factor, zero_factor=zero_factor
        )

    return dataclasses.replace(
        layer,
        k=stored(old_k, packed.k),
        v=stored(old_v, packed.v),
        tail_k=tail.k,
        tail_v=tail.v,
        packed_length=packed.length,
        tail_length=tail.length,
    )


def _package(implementation: str) -> ModuleType:
    return importlib.import_module({"pallas": "pallas_kernels", "cuda": "cuda_ffi"}[implementation])


def _packed(layer: LayerCache) -> tuple[QuantizedArray, QuantizedArray]:
    """The packed keys and values; an unquantised layer has an empty packed region.

    Raises:
      NotImplementedError: where the kernels do not know what the layer stores.
    """
    from minikv_jax.methods.base import QUANTIZERS
    from minikv_jax.methods.quantizers import MinMax

    if layer.window is not None:
        raise NotImplementedError(f"window={layer.window}: the kernels keep no positions for a sliding window")
    if layer.k is None and layer.v is None:
        return _empty(layer, "tokens"), _empty(layer, "channels")
    plain = getattr(type(QUANTIZERS[layer.config.quantizer]), "dequantize", None) is MinMax.dequantize
    if not plain or not isinstance(layer.k, QuantizedArray) or not isinstance(layer.v, QuantizedArray):
        raise NotImplementedError(f"quantizer={layer.config.quantizer!r}: the kernels read min/max codes only")
    return layer.k, layer.v


def _regions(package: ModuleType, layer: LayerCache, k: QuantizedArray, v: QuantizedArray) -> tuple[Any, Any]:
    """A layer's packed region and tail as the values of a kernel package."""

    def packed(x: QuantizedArray) -> Any:
        factors = None if x.scale_factor is None else (x.scale_factor, x.zero_factor)
        return package.Packed(x.planes, x.scale, x.zero, factors)

    tail = package.Region(layer.tail_k, layer.tail_v, layer.tail_length)
    return package.Region(packed(k), packed(v), layer.packed_length), tail


def _storage(package: ModuleType, k: QuantizedArray, v: QuantizedArray) -> Any:
    return package.Storage(k.bits, v.bits, k.group_size)


def _empty(layer: LayerCache, axis: Axis) -> QuantizedArray:
    batch, kv_heads, _, head_dim = layer.tail_k.shape
    group = layer.config.group_size
    columns = head_dim if axis == "tokens" else head_dim // group
    metadata = jnp.zeros((batch, kv_heads, 0, columns), jnp.float16)
    words = jnp.zeros((batch, kv_heads, 0, head_dim), jnp.uint32)
    return QuantizedArray((words,), metadata, metadata, None, None, bits=2, group_size=group, axis=axis)
