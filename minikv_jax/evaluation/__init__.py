"""How much of the model's behaviour survives a compressed cache."""

from minikv_jax.evaluation.fidelity import Fidelity as Fidelity
from minikv_jax.evaluation.fidelity import book_windows as book_windows
from minikv_jax.evaluation.fidelity import compare as compare
