"""The full cache: every token, in the model's dtype. All methods are compared with it."""

from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method

FULL = register_method(Method(name="full", citation="every token, in the model's dtype"))
