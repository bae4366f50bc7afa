"""Benchmarks: kernels against cuDNN and the device's memory rates, whole models against the hardware's floor."""
