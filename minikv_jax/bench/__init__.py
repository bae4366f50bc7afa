"""Benchmarks: kernels against cuDNN and against the rates this device reads and copies at."""
