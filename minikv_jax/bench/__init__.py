"""Benchmarks: kernels beside cuDNN and the device's own rates, and whole models beside the hardware's floor."""
