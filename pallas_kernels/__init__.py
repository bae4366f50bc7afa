"""Pallas Mosaic GPU kernels for Hopper GPUs.

Imports nothing from `minikv_jax`: the functions take plain arrays in the layout of `docs/packed-layout.md`.
"""

from pallas_kernels.arrays import Packed, Region, Storage
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.hopper import why_unavailable
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantize import quantize

__all__ = ["Packed", "Region", "Storage", "decode_attention", "prefill_attention", "quantize", "why_unavailable"]
