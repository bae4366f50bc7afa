"""The ops, one per file: contract, plain JAX, and adapters to the kernels."""
