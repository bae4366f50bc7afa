"""Pallas Mosaic GPU kernels for Hopper GPUs.

Imports nothing from `minikv_jax`: the functions take plain arrays in the layout of `docs/architecture.md`.
"""

from pallas_kernels.hopper import why_unavailable
from pallas_kernels.prefill_attention import prefill_attention


def available() -> bool:
    """Whether the kernels can run here."""
    return why_unavailable() is None


__all__ = ["available", "prefill_attention", "why_unavailable"]
