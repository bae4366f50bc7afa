"""Pallas Mosaic GPU kernels for Hopper. None yet: `implementation="pallas"` says so."""
